"""Every option of a recipe with its meaning and unit, a class a section.

The sections stand in the order in which a batch meets them; `recipe.Recipe` puts them together and checks
what they say of each other. The file is long because every option stands in it.
"""

import re
from typing import Annotated, Any, Literal, Self
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


class Section(BaseModel):
    """A part of a recipe: frozen, typed strictly, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Shape(Section):
    """The `config.json` of a model built from scratch, in Hugging Face's names."""

    # No qwen2: transformers opens every tokenizer in such a folder as Qwen's own, and text is lost.
    model_type: Literal["llama", "qwen3"] = "llama"
    hidden_size: PositiveInt
    intermediate_size: PositiveInt  # width of the feed-forward layers
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None  # null: as many as attention heads
    head_dim: PositiveInt | None = None  # null: hidden_size / num_attention_heads
    max_position_embeddings: PositiveInt = 512  # tokens
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True  # one matrix for reading and writing tokens

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


class NewTokenizer(Section):
    """A sentencepiece BPE tokenizer, trained on the text of `data.train`."""

    pieces: PositiveInt  # vocabulary, special tokens included
    byte_fallback: bool = True  # 256 pieces that spell out what no other piece covers


class Student(Section):
    """The model that learns: loaded (`model`), or built from scratch (`shape`)."""

    model: str | None = None  # folder or Hub repository
    shape: Shape | None = None
    tokenizer: NewTokenizer | None = None  # for `shape` without a teacher; null: the teacher's
    method: Literal["full", "lora", "dora"] = "full"  # which parameters move
    rank: PositiveInt = 16  # of the LoRA or DoRA matrices
    scale: PositiveFloat = 20.0  # of their product
    dropout: NonNegativeFloat = Field(0.0, lt=1)  # share of their inputs set to 0 while training
    layers: PositiveInt | None = None  # how many of the last layers they sit in; null: all

    @model_validator(mode="after")
    def check(self) -> Self:
        if (self.model is None) == (self.shape is None):
            raise ValueError("needs either `model` (load one) or `shape` (build one), not both")
        if self.shape is not None and self.method != "full":
            raise ValueError(f"method {self.method!r} adapts a loaded model; a new `shape` needs 'full'")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("`tokenizer` is for a new `shape`; a loaded model keeps its own")
        if self.method == "full" and self.dropout:
            raise ValueError("`dropout` acts inside LoRA or DoRA matrices; method 'full' has none")
        return self


class Teacher(Section):
    """A model that teaches. Its weights do not learn.

    The first one answers `data.prompts`, and is what the student is compared with. What `others` say is
    mixed into its targets.
    """

    model: str  # `embedded`, `student` (as it is before training), a folder, or a Hub repository
    ema: Fraction | None = None  # of `student`: share of its weights that a step keeps
    weight: PositiveFloat = 1.0  # of its targets, as a share of all teachers' weights
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
    """Weights of the finished student in few bits, with mlx-lm's round-to-nearest."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 64  # weights that share a scale and a bias


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
