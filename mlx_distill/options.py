"""Every option of a recipe with its meaning and unit, a class a section.

The sections stand in the order in which a batch meets them; `recipe.Recipe` puts them together and checks
what they say of each other. The file is long because every option stands in it.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Bits = Literal[2, 3, 4, 5, 6, 8]


class Section(BaseModel):
    """A part of a recipe: frozen, typed strictly, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
        if self.head_dim is None and self.hidden_size % heads:
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


MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group size, which are fixed there


def filled(section: Any) -> Any:
    """A section with the bits and the group size of its mode, if that fixes them."""
    if not isinstance(section, dict) or section.get("mode") not in MODES:
        return section
    bits, group_size = MODES[section["mode"]]
    return {"bits": bits, "group_size": group_size, **section}


def check_grid(mode: str, bits: int, group_size: int) -> None:
    """Refuse bits or groups that a mode does not have."""
    if mode in MODES and (bits, group_size) != MODES[mode]:
        bits, group_size = MODES[mode]
        raise ValueError(
            f"mode {mode} has {bits} bits and groups of {group_size}; leave `bits` and `group_size` out"
        )
    if mode == "affine" and group_size == 16:
        raise ValueError("mode affine has groups of 32, 64 or 128; got `group_size` 16")


class Grid(Section):
    """Weights in few bits, rounded to the nearest."""

    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"  # affine: a scale and a bias a group
    bits: Bits = 4
    group_size: Literal[16, 32, 64, 128] = 64  # weights that share a scale

    @model_validator(mode="before")
    @classmethod
    def fill_mode(cls, value: Any) -> Any:
        return filled(value)

    @model_validator(mode="after")
    def check_mode(self) -> Self:
        check_grid(self.mode, self.bits, self.group_size)
        return self


class Teacher(Section):
    """A model that teaches. Its weights do not learn.

    The first one answers `data.prompts`, and is what the student is compared with. What `others` say is
    mixed into its targets.
    """

    model: str  # `embedded`, `student` (as it is before training), a folder, or a Hub repository
    ema: Fraction | None = None  # of `student`: share of its weights that a step keeps
    weight: PositiveFloat = 1.0  # of its targets, as a share of all teachers' weights
    quantize: Grid | None = None  # it teaches in few bits, to take less memory; null: as it is stored
    source: Literal["live", "cache", "auto"] = "live"  # auto: cache, if both do not fit
    top_k: PositiveInt | None = None  # likeliest tokens kept of each distribution; null: all
    tail: bool = True  # keep the mass of all other tokens too, as one more outcome
    sampled: PositiveInt | None = None  # cache: tokens drawn from each distribution, in place of `top_k`
    precision: Literal["compact", "exact"] = "compact"  # cache: log-probabilities in few bits, or float32
    cache: str | None = None  # folder of the cache, to share it between runs; null: in the run folder
    others: list[Self] = []  # more teachers, with these same options

    @model_validator(mode="after")
    def check(self) -> Self:
        cached = self.source != "live"
        if cached and self.top_k is None and self.sampled is None:
            raise ValueError(f"source {self.source!r} stores the likeliest tokens; set `top_k`, such as 64")
        if self.sampled is not None and (self.top_k is not None or not cached):
            raise ValueError("`sampled` stands in place of `top_k`, for source 'cache'; set one of the two")
        if self.cache is not None and not cached:
            raise ValueError("`cache` is a folder for source 'cache'; a live teacher stores nothing")
        if self.top_k is None and not self.tail:
            raise ValueError("`tail` is what `top_k` leaves over; without `top_k` there is none")
        if self.ema is not None and self.model != "student":
            raise ValueError(f"`ema` follows the student; it needs model 'student', not {self.model!r}")
        if self.ema is not None and cached:
            raise ValueError("`ema` changes at every step; it needs source 'live'")
        if any(other.others for other in self.others):
            raise ValueError("`others` stand in one list; they have no `others` of their own")
        return self


class Source(Section):
    """Where rows come from. In a recipe a plain string stands for `{source: STRING}`."""

    source: str  # a .jsonl file, a folder, a Hub dataset, or a corpus: pocket, stdlib
    task: Literal["code", "summary", "both", "trace"] | None = None  # of a corpus; null there: code
    split: str | None = None  # null: the one that the key names; `train` for prompts and replay
    rows: PositiveInt | None = None  # at most so many; null: all (a corpus needs a number)
    start: NonNegativeInt = 0  # rows passed over first
    seed: NonNegativeInt = 0  # of a corpus: draws its functions, their order and their words
    weight: PositiveFloat | None = None  # share of the training rows drawn from it; null: as many as it has


class Reasoning(Section):
    """Worked steps that stand before an answer, between two marks."""

    open: str = "<think>"
    close: str = "</think>"
    learn: Literal["both", "answer", "two_tasks"] = "both"  # two_tasks: steps and answer as rows of their own
    alpha: Fraction = 0.5  # two_tasks: share of the answers in the loss

    @model_validator(mode="after")
    def check_marks(self) -> Self:
        if not self.open.strip() or not self.close.strip():
            raise ValueError("`open` and `close` are marks that can be seen, such as <think> and </think>")
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"one mark holds the other: {self.open!r} and {self.close!r}; change one")
        if self.alpha != 0.5 and self.learn != "two_tasks":
            raise ValueError("`alpha` weighs steps against answers; it needs `learn` two_tasks")
        return self


class Data(Section):
    """What is read. `valid` and `test` default to those of a `train` that is a folder or dataset."""

    train: Source | None = None  # rows with answers: the user's labels
    prompts: Source | None = None  # rows whose answers the teacher writes
    valid: Source | None = None  # watched while training
    test: Source | None = None  # touched by `evaluate` alone
    replay: list[Source] = []  # more rows with answers, so that what they show is not forgotten
    reasoning: Reasoning | None = None  # null: what stands between marks is text like any other
    max_tokens: PositiveInt = 1024  # longer rows are left out, and counted in the log
    count: Literal["completion", "all"] = "completion"  # labels that the losses see

    @field_validator("train", "prompts", "valid", "test", mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("replay", mode="before")
    @classmethod
    def from_strings(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"source": one} if isinstance(one, str) else one for one in value]

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.train is None and self.prompts is None:
            raise ValueError("needs `train` (rows with answers), `prompts` (rows without), or both")
        return self


class Sampling(Section):
    """How tokens are drawn: temperature first, then top-k, then top-p, then one token."""

    temperature: NonNegativeFloat = 0.0  # 0: always the likeliest token
    top_k: PositiveInt | None = None  # likeliest tokens that stay; null: all
    top_p: float = Field(
        default=1.0, gt=0, le=1
    )  # fewest likeliest tokens that hold this share of what stayed

    @property
    def temperatures(self) -> list[float]:
        """All at which tokens are drawn."""
        return [self.temperature]

    @model_validator(mode="after")
    def check_sampling(self) -> Self:
        if not any(self.temperatures) and (self.top_k is not None or self.top_p < 1):
            raise ValueError("`top_k` and `top_p` cut what is drawn from; `temperature` 0 draws nothing")
        return self


class Filters(Section):
    """Which answers are dropped, each with its reason; empty and unfinished ones always are."""

    stubs: bool = False  # drop answers of one line with fewer than 10 characters
    min_tokens: PositiveInt | None = None  # of an answer (words, from an endpoint); null turns it off
    max_tokens: PositiveInt | None = None  # of an answer, likewise
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] | None = None  # as in ISO 639-1: en, de, ...
    parses: bool = False  # the program in the answer is Python
    verified: bool = False  # it passes the tests of its row, or equals one of the row's references
    repetition: Share | None = None  # largest share of words in 4-grams that stood before
    perplexity: PositiveFloat | None = None  # largest, under the teacher
    duplicates: Share | None = None  # from this Jaccard similarity on; 0.3 to 1
    decontaminate: PositiveInt | None = None  # n of the n-grams (words) of `data.valid` and `data.test`


class Endpoint(Section):
    """An OpenAI-compatible server on your own network that answers `data.prompts` in place of the teacher."""

    url: str  # up to /v1, such as http://192.168.1.20:8080/v1
    model: str  # its name there
    key_variable: str | None = None  # environment variable that holds the key; null: none is sent
    chat: bool = True  # ask for a chat's next message; false: for the text that follows the prompt
    at_once: PositiveInt = 4  # requests under way
    per_minute: PositiveFloat | None = None  # most requests; null: no limit
    retries: NonNegativeInt = 5  # of a request that fails, after 1, 2, 4, ... seconds
    timeout: PositiveFloat = 120.0  # seconds for one answer

    # What stands in a wrong place may be a secret, and is not shown.
    @field_validator("url")
    @classmethod
    def check_url(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("no name or password in it; a key stands in the environment, see `key_variable`")
        if "?" in value or "#" in value:
            raise ValueError("an address that ends with its path, such as .../v1; got one with `?` or `#`")
        wanted = f"an address such as http://192.168.1.20:8080/v1; got {value[:80]!r}"
        try:
            address = urlsplit(value)
            known = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            raise ValueError(wanted) from None
        if not known or not value.isprintable() or " " in value:
            raise ValueError(wanted)
        if address.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"an address up to /v1, to which /chat/completions is added; got {value[:80]!r}")
        return value.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def check_key_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "the name of an environment variable in capital letters, such as SERVER_KEY; never the key"
            )
        return value


class OnPolicy(Sampling):
    """The student learns from its own answers to all questions of the data, judged by the live teacher."""

    share: Share = 1.0  # chance that a step's rows are its own (lambda of GKD)
    temperature: NonNegativeFloat = 1.0  # at which it answers
    max_tokens: PositiveInt = 128  # of an answer
    buffer: NonNegativeInt = 0  # own rows kept to be learned again (DistiLLM); 0: each is fresh
    schedule: Literal["constant", "adaptive"] = "constant"  # adaptive: `share` is reached as validation asks


class Generate(Sampling):
    """How `data.prompts` are answered, and which answers are kept."""

    samples: PositiveInt = 1  # answers to each prompt
    keep: Literal["all", "first", "best"] = "all"  # of those that pass the filters; best: likeliest a token
    max_tokens: PositiveInt = 256  # of an answer; unfinished ones are dropped
    batch_size: PositiveInt = 64  # answers written at once
    system: str | None = None  # message that opens each chat, for the writer alone
    examples: Source | None = None  # rows with answers that stand before each prompt, for the writer alone
    thinking: bool | None = None  # `enable_thinking` of the chat template; null: as the template has it
    filters: Filters = Filters()
    endpoint: Endpoint | None = None  # null: the teacher answers
    on_policy: OnPolicy | None = None  # null: all rows are there before training

    @field_validator("examples", mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_samples(self) -> Self:
        if self.temperature == 0 and self.samples > 1 and self.endpoint is None:
            raise ValueError(
                f"{self.samples} `samples` at `temperature` 0 are all the same; set a temperature"
            )
        return self


class Term(Section):
    """One loss of the objective: its weight and the options of its function."""

    weight: PositiveFloat = 1.0
    options: dict[str, Any] = {}


class Curriculum(Section):
    """Which rows come when, by how difficult they are."""

    by: Literal["length", "teacher_nll", "student_loss", "pass_rate"]  # what makes a row difficult
    pace: Literal["sorted", "competence", "weighted"] = "competence"  # see docs/curriculum.md
    reverse: bool = False  # the difficult ones first
    start: Share = 0.1  # competence: share of the rows that is drawn from at first
    until: Share = 0.5  # competence: share of the steps after which all are


class Train(Section):
    """The loop. A step is one finished optimizer update."""

    steps: PositiveInt
    batch_tokens: PositiveInt = 4096  # tokens of one forward pass, padding included
    micro_batches: PositiveInt = 1  # forward passes added up into one update
    learning_rate: PositiveFloat = 1e-5  # peak
    warmup: NonNegativeInt = 0  # steps from 0 up to the peak
    final_learning_rate: NonNegativeFloat = Field(0.1, le=1)  # end of the cosine, a share of the peak
    weight_decay: NonNegativeFloat = 0.01  # AdamW; matrices only
    beta2: Fraction = 0.999  # AdamW
    clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 turns it off
    gradient_checkpointing: bool = False  # recompute layers in the backward pass, to save memory
    logits_mib: PositiveInt = 384  # memory for logits and losses on them: sets how many places at a time
    compile: bool = True
    curriculum: Curriculum | None = None  # null: rows in random order
    log_every: NonNegativeInt = 20  # steps; 0 turns it off, here and below
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 200


class Quantize(Section):
    """The finished student in few bits. See docs/quantization.md."""

    method: Literal["rtn", "dwq", "qad", "awq", "gptq"] = "rtn"  # rtn: rounded to the nearest
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"  # affine: a scale and a bias a group
    bits: Bits | list[Bits] = 4  # of a weight; a list makes a model each; with `mixed`: on average
    group_size: Literal[16, 32, 64, 128] = 64  # weights that share a scale
    mixed: list[Bits] = []  # widths that a layer may have, more where it harms more; []: all have `bits`
    gib: PositiveFloat | None = None  # with `mixed`: size of the weights, in place of `bits`
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of all else; null: as the student has it
    towards: Literal["teacher", "student"] | None = None  # dwq, qad: learn from; null: the teacher, if any
    steps: PositiveInt = 200  # dwq, qad: updates
    learning_rate: PositiveFloat = 0.01  # dwq, qad: peak, in steps of the grid that a weight is rounded to
    temperature: PositiveFloat = 1.0  # dwq, qad: of both distributions
    rank: PositiveInt | None = None  # qad: of LoRA matrices that learn alone; null: all weights learn
    rows: PositiveInt = 128  # mixed, awq, gptq: rows to learn from, on which layers are measured

    @model_validator(mode="before")
    @classmethod
    def fill_mode(cls, value: Any) -> Any:
        return filled(value)

    @field_validator("bits", mode="before")
    @classmethod
    def check_bits(cls, value: Any) -> Any:
        known = get_args(Bits)
        for bits in value if isinstance(value, list) else [value]:
            if type(bits) is not int or bits not in known:
                raise ValueError(f"one of {', '.join(map(str, known))}; got {bits!r}")
        return value

    @model_validator(mode="after")
    def check_method(self) -> Self:
        for bits in self.widths:
            check_grid(self.mode, bits, self.group_size)
        if self.mode != "affine" and self.method in ("dwq", "awq", "gptq"):
            raise ValueError(
                f"method {self.method} finds scales and biases, and mode {self.mode} has no biases; "
                "use mode affine, or method rtn or qad"
            )
        if wrong := [bits for bits in self.widths if self.method == "gptq" and bits not in (2, 4, 8)]:
            raise ValueError(f"method gptq has 2, 4 and 8 bits; got `bits` {wrong[0]}; use awq or dwq for it")
        if not self.widths:
            raise ValueError("`bits` []: at least one width")
        return self

    @model_validator(mode="after")
    def check_mixed(self) -> Self:
        if self.gib is not None and not self.mixed:
            raise ValueError("`gib` is a size for layers of several widths; set `mixed`, such as [2, 4, 8]")
        if not self.mixed:
            return self
        if self.method in ("awq", "gptq"):
            raise ValueError(f"method {self.method} has one width for all layers; drop `mixed`")
        if self.mode != "affine":
            raise ValueError(f"`mixed` chooses among widths of mode affine; mode {self.mode} has one")
        if self.gib is not None and self.bits != 4:
            raise ValueError(f"`gib` {self.gib:g} takes the place of `bits` {self.bits}; drop one of them")
        if len(set(self.mixed)) < max(2, len(self.mixed)):
            raise ValueError(f"`mixed` {self.mixed}: two widths or more, each once")
        for bits in self.widths if self.gib is None else []:
            if not min(self.mixed) < bits < max(self.mixed):
                raise ValueError(f"`mixed` {self.mixed}: needs widths below and above `bits` {bits}")
        return self

    @model_validator(mode="after")
    def check_idle(self) -> Self:
        learned, measured = ("dwq", "qad"), ("awq", "gptq")
        users: dict[str, tuple[str, ...]] = dict.fromkeys(
            ("towards", "steps", "learning_rate", "temperature"), learned
        )
        users |= {"rank": ("qad",), "rows": (self.method,) if self.mixed else measured}
        for key, methods in users.items():
            given, unset = getattr(self, key), type(self).model_fields[key].default
            if given != unset and self.method not in methods:  # a resolved recipe has every default
                those = " and ".join(methods) + (" and `mixed`" if key == "rows" else "")
                raise ValueError(f"`{key}` {given} is for method {those}, not {self.method}; drop it")
        return self

    @property
    def widths(self) -> list[Bits]:
        """Bits of a weight of each model that is made."""
        return self.bits if isinstance(self.bits, list) else [self.bits]


class Evaluate(Sampling):
    """What is measured on `data.test`, for every model of the run alike."""

    tasks: list[Literal["fidelity", "code", "summary", "exact", "speed"]] = ["fidelity", "speed"]
    baseline: bool = True  # also train the student on `data.train` alone, for as many steps
    max_tokens: PositiveInt = 256  # of a generated answer
    batch_size: PositiveInt = 64  # answers written at once
    seconds: PositiveFloat = 5.0  # that one problem's tests may take
    samples: PositiveInt = 1  # answers to each row; scores are their mean
    tune: list[NonNegativeFloat] = []  # temperatures tried on `data.valid`; each model then uses its best

    @property
    def temperatures(self) -> list[float]:
        return self.tune or [self.temperature]

    @model_validator(mode="after")
    def check_samples(self) -> Self:
        if self.tune and self.temperature > 0:
            raise ValueError(f"`tune` finds the temperature; leave out `temperature` {self.temperature:g}")
        if self.samples > 1 and not any(self.temperatures):
            raise ValueError(
                f"{self.samples} `samples` at `temperature` 0 are all the same; set a temperature, or `tune`"
            )
        return self


class Export(Section):
    """What is left for other programs. Each artefact is reloaded and compared."""

    formats: list[Literal["mlx"]] = ["mlx"]  # mlx: folders for mlx-lm; [] leaves them unchecked


class Compress(Section):
    """Several sizes of one student, for `mlx-distill compress`; the smallest that is good enough is named."""

    ratios: list[Fraction] = []  # `student.prune.ratio` of a run each; []: the student as it is
    bits: list[Bits] = []  # widths of each student; []: as `quantize` says
    score: str | None = None  # metric of evaluation.json; null: the first score of a task, or top1_agreement
    line: Share = 0.9  # of the teacher's score that is good enough

    @model_validator(mode="after")
    def check_doubles(self) -> Self:
        for key in ("ratios", "bits"):
            values = getattr(self, key)
            doubled = next((value for value in values if values.count(value) > 1), None)
            if doubled is not None:
                raise ValueError(f"`{key}` names {doubled:g} twice; drop one")
        return self
