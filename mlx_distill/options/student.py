"""The student: loaded, built from a shape, or cut out of a bigger model."""

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mlx_distill.options.section import Fraction, Section


class Shape(Section):
    """The `config.json` of a model built from scratch, in Hugging Face's names."""

    # No qwen2: transformers opens every tokenizer in such a folder as Qwen's own, and text is lost.
    model_type: Literal["llama", "qwen3", "qwen3_moe"] = "llama"
    hidden_size: PositiveInt
    intermediate_size: PositiveInt  # width of the feed-forward layers; of an expert, where there are experts
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None  # null: as many as attention heads
    head_dim: PositiveInt | None = None  # null: hidden_size / num_attention_heads
    max_position_embeddings: PositiveInt = 512  # tokens
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True  # one matrix for reading and writing tokens
    num_experts: PositiveInt | None = None  # qwen3_moe: feed-forwards of a layer, for a router to choose from
    num_experts_per_tok: PositiveInt | None = None  # qwen3_moe: how many it chooses for a token

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @model_validator(mode="after")
    def check_heads(self) -> Self:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if kv is not None and heads % kv:
            raise ValueError(f"{heads} attention heads are no multiple of {kv} key and value heads")
        # transformers, which opens the tokenizer of a folder, asks for it in a llama whatever head_dim says.
        if (self.head_dim is None or self.model_type == "llama") and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {heads} attention heads")
        if (self.head_dim or self.hidden_size // heads) % 2:
            raise ValueError("the size of a head must be even, for rotary positions")
        return self

    @model_validator(mode="after")
    def check_experts(self) -> Self:
        sizes = {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
        for key, size in sizes.items():
            if self.model_type == "qwen3_moe" and size is None:
                raise ValueError(f"model_type qwen3_moe needs `{key}`")
            if self.model_type != "qwen3_moe" and size is not None:
                raise ValueError(f"`{key}` is for model_type qwen3_moe; {self.model_type} has no experts")
        if (self.num_experts or 0) < (self.num_experts_per_tok or 0):
            raise ValueError(
                f"`num_experts_per_tok` {self.num_experts_per_tok} are more than there are: "
                f"`num_experts` {self.num_experts}"
            )
        return self


class NewTokenizer(Section):
    """A sentencepiece BPE tokenizer, trained on the text of `data.train`."""

    pieces: PositiveInt  # vocabulary, special tokens included
    byte_fallback: bool = True  # 256 pieces that spell out what no other piece covers


class KeptSizes(Section):
    """Sizes of a pruned model, in Hugging Face's names; null: as the model that is cut has it."""

    num_hidden_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None  # of an expert, where there are experts
    num_attention_heads: PositiveInt | None = None  # key and value heads go with them
    num_experts: PositiveInt | None = None

    @model_validator(mode="after")
    def check_any(self) -> Self:
        if all(size is None for _, size in self):
            raise ValueError("at least one size, such as {num_hidden_layers: 2}")
        return self


class Sparsity(Section):
    """Weights set to zero, which stay zero while the student is healed; the shapes stay as they are."""

    share: Fraction = 0.5  # of the weights of each matrix in the layers
    pattern: Literal["unstructured", "2:4"] = "unstructured"  # 2:4: two of every four in a row
    by: Literal["wanda", "magnitude"] = "wanda"  # wanda: magnitude times the size of what it multiplies

    @model_validator(mode="after")
    def check_share(self) -> Self:
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"`pattern` 2:4 sets half of the weights to zero; drop `share` {self.share:g}")
        return self


class Prune(Section):
    """A student cut out of a bigger model, and then trained like any other. See docs/pruning.md."""

    model: str | None = None  # what is cut, a folder or Hub repository; null: the teacher
    ratio: Fraction | None = None  # target: share of its weights that stays
    parameters: PositiveInt | None = None  # target: weights that stay, at most
    gib: PositiveFloat | None = None  # target: size of the weights in the type they are stored in, at most
    axes: list[Literal["layers", "hidden", "feed_forward", "heads", "experts"]] = [
        "hidden",
        "feed_forward",
        "heads",
    ]  # along which it is cut to reach the target
    sizes: KeptSizes | None = None  # in place of a target
    by: Literal["activation", "magnitude", "random"] = "activation"  # which channels, heads, experts stay
    layers_by: Literal["influence", "loss", "every_other", "random"] = "influence"  # which layers stay
    tokens: PositiveInt = 65536  # of the rows to learn from, on which importance is measured
    vocabulary: bool = False  # keep only the tokens that the rows to learn from use, in the teacher too
    dense: bool = False  # the experts that stay become one feed-forward layer
    sparsity: Sparsity | None = None
    rounds: PositiveInt = 1  # the way to the target in so many cuts
    heal: PositiveInt | None = None  # steps of training after each cut but the last, which `train` follows

    @model_validator(mode="after")
    def check_target(self) -> Self:
        targets = [key for key in ("ratio", "parameters", "gib", "sizes") if getattr(self, key) is not None]
        if len(targets) > 1:
            raise ValueError(f"`{targets[0]}` and `{targets[1]}` are both targets; keep one")
        if not targets and not (self.vocabulary or self.sparsity or self.dense):
            raise ValueError("needs a target: `ratio`, `parameters`, `gib` or `sizes`")
        chosen = self.axes != type(self).model_fields["axes"].default
        if chosen and (not targets or targets == ["sizes"]):
            raise ValueError("`axes` say how a `ratio`, `parameters` or `gib` is reached; drop them")
        if len(set(self.axes)) < len(self.axes) or not self.axes:
            raise ValueError("`axes`: each at most once, and at least one")
        if self.rounds > 1 and self.heal is None:
            raise ValueError(f"{self.rounds} `rounds` need `heal`, the steps of training between them")
        if self.rounds == 1 and self.heal is not None:
            raise ValueError("`heal` is training between `rounds`, and there is one round")
        if self.rounds > 1 and not targets:
            raise ValueError(f"{self.rounds} `rounds` approach a target, and there is none")
        return self


class Student(Section):
    """The model that learns: loaded (`model`), built from scratch (`shape`), or cut out (`prune`)."""

    model: str | None = None  # folder or Hub repository
    shape: Shape | None = None
    prune: Prune | None = None
    tokenizer: NewTokenizer | None = None  # for `shape` without a teacher; null: the teacher's
    method: Literal["full", "lora", "dora"] = "full"  # which parameters move
    rank: PositiveInt = 16  # of the LoRA or DoRA matrices
    scale: PositiveFloat = 20.0  # of their product
    dropout: NonNegativeFloat = Field(0.0, lt=1)  # share of their inputs set to 0 while training
    layers: PositiveInt | None = None  # how many of the last layers they sit in; null: all

    @model_validator(mode="after")
    def check(self) -> Self:
        if sum(way is not None for way in (self.model, self.shape, self.prune)) != 1:
            raise ValueError(
                "needs one of `model` (load one), `shape` (build one) and `prune` (cut one out), not several"
            )
        if self.shape is not None and self.method != "full":
            raise ValueError(f"method {self.method!r} adapts a loaded model; a new `shape` needs 'full'")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` is for a new `shape`; a loaded model keeps its own")
        if self.prune is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` is for a new `shape`; what is cut out keeps its own")
        if self.prune is not None and self.prune.sparsity is not None and self.method != "full":
            raise ValueError(
                f"method {self.method!r} would add matrices to the zeros of `prune.sparsity`; use 'full'"
            )
        if self.method == "full" and self.dropout:
            raise ValueError("`dropout` acts inside LoRA or DoRA matrices; method 'full' has none")
        return self
