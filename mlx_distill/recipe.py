"""A recipe: what a run is made of, every option with its meaning and unit.

`load` reads strict YAML, applies `section.key=value` overrides and returns a frozen `Recipe`, or
raises one `RecipeError` that lists every mistake with its path. No other module defines an option.
The top-level keys are the modules that a batch meets, in that order. The file is long because every
option stands in it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.losses import NEEDS_TAIL
from mlx_distill.losses.menu import MENU, options_of
from mlx_distill.mistakes import explain, nearest, shown, wanted
from mlx_distill.strict_yaml import parse_value, parse_yaml

EVALUATION_TASKS = ("fidelity", "code", "summary", "speed")


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
    """A model that teaches. Its weights never change.

    The first one answers `data.prompts`, and is what the student is compared with. What `others` say is
    mixed into its targets.
    """

    model: str  # `embedded`, a folder, or a Hub repository
    weight: PositiveFloat = 1.0  # of its targets, as a share of all teachers' weights
    source: Literal["live", "cache"] = "live"  # cache: runs once over all rows, and is then unloaded
    top_k: PositiveInt | None = None  # likeliest tokens kept of each distribution; null: all
    tail: bool = True  # keep the mass of all other tokens too, as one more outcome
    others: list[Self] = []  # more teachers, with these same options

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.source == "cache" and self.top_k is None:
            raise ValueError("source 'cache' stores the likeliest tokens; set `top_k`, such as 64")
        if self.top_k is None and not self.tail:
            raise ValueError("`tail` is what `top_k` leaves over; without `top_k` there is none")
        if any(other.others for other in self.others):
            raise ValueError("`others` stand in one list; they have no `others` of their own")
        return self


class Source(Section):
    """Where rows come from. In a recipe a plain string stands for `{source: STRING}`."""

    source: str  # a .jsonl file, a folder, a Hub dataset, or a corpus: pocket, stdlib
    task: Literal["code", "summary", "both"] | None = None  # of a corpus; null there: code
    split: str | None = None  # null: the one that the key names, `train` for prompts
    rows: PositiveInt | None = None  # at most so many; null: all (a corpus needs a number)
    start: NonNegativeInt = 0  # rows passed over first
    seed: NonNegativeInt = 0  # of a corpus: draws its functions, their order and their words


class Data(Section):
    """What is read. `valid` and `test` default to those of a `train` that is a folder or dataset."""

    train: Source | None = None  # rows with answers: the user's labels
    prompts: Source | None = None  # rows whose answers the teacher writes
    valid: Source | None = None  # watched while training
    test: Source | None = None  # touched by `evaluate` alone
    max_tokens: PositiveInt = 1024  # longer rows are left out, and counted in the log
    count: Literal["completion", "all"] = "completion"  # labels that the losses see

    @field_validator("train", "prompts", "valid", "test", mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.train is None and self.prompts is None:
            raise ValueError("needs `train` (rows with answers), `prompts` (rows without), or both")
        return self


class Generate(Section):
    """How the teacher answers `data.prompts`: greedily, up to its end-of-turn token."""

    max_tokens: PositiveInt = 256  # of an answer; unfinished ones are dropped
    batch_size: PositiveInt = 64  # answers written at once


class Term(Section):
    """One loss of the objective: its weight and the options of its function."""

    weight: PositiveFloat = 1.0
    options: dict[str, Any] = {}


class Train(Section):
    """The loop. A step is one finished optimizer update."""

    steps: PositiveInt
    batch_tokens: PositiveInt = 4096  # tokens of one forward pass, padding included
    micro_batches: PositiveInt = 1  # forward passes added up into one update
    learning_rate: PositiveFloat = 1e-5  # peak
    warmup: NonNegativeInt = 0  # steps from 0 up to the peak
    final_learning_rate: NonNegativeFloat = Field(0.1, le=1)  # end of the cosine, as a share of the peak
    weight_decay: NonNegativeFloat = 0.01  # AdamW; matrices only
    beta2: float = Field(0.999, gt=0, lt=1)  # AdamW
    clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 turns it off
    gradient_checkpointing: bool = False  # recompute layers in the backward pass, to save memory
    logits_mib: PositiveInt = 384  # memory for logits and losses on them: sets how many places at a time
    compile: bool = True
    log_every: NonNegativeInt = 20  # steps; 0 turns it off, here and below
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 200


class Quantize(Section):
    """Weights of the finished student in few bits, with mlx-lm's round-to-nearest."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 64  # weights that share a scale and a bias


class Evaluate(Section):
    """What is measured on `data.test`, for every model of the run alike."""

    tasks: list[Literal["fidelity", "code", "summary", "speed"]] = ["fidelity", "speed"]
    baseline: bool = True  # also train the student on `data.train` alone, for as many steps
    max_tokens: PositiveInt = 256  # of a generated answer
    batch_size: PositiveInt = 64  # answers written at once
    seconds: PositiveFloat = 5.0  # that one problem's tests may take


class Export(Section):
    """What is left for other programs. Each artefact is reloaded and compared."""

    formats: list[Literal["mlx"]] = ["mlx"]  # mlx: folders for mlx-lm; [] leaves them unchecked


class Recipe(Section):
    """One run, from the teacher to the exported student."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)  # of the run folder
    seed: NonNegativeInt = 0
    student: Student
    teacher: Teacher | None = None  # null: plain training on `data.train`
    data: Data
    generate: Generate = Generate()
    objective: dict[str, Term]
    train: Train
    quantize: Quantize | None = None  # null: no quantized student
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @field_validator("objective", mode="before")
    @classmethod
    def check_losses(cls, value: Any) -> Any:
        """Gather each loss's own options, checked against the signature of its function."""
        if not isinstance(value, dict) or not value:
            raise ValueError("a mapping from losses to their options, such as {forward_kl: {weight: 1.0}}")
        terms, mistakes = {}, []
        for name, given in value.items():
            given = {} if given is None else given
            if name not in MENU:
                mistakes.append(f"unknown loss `objective.{name}`{nearest(name, MENU, ['objective'])}")
            elif not isinstance(given, dict):
                mistakes.append(f"`objective.{name}`: a mapping, such as {{weight: 1.0}}; got {shown(given)}")
            else:
                options = {key: option for key, option in given.items() if key != "weight"}
                mistakes += _check_options(name, options)
                terms[name] = {"weight": given.get("weight", 1.0), "options": options}
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return terms

    @model_validator(mode="after")
    def check_together(self) -> Self:
        mistakes = self._check_teaching()
        if self.teacher is None and self.data.prompts is not None:
            mistakes.append("`data.prompts` are answered by the teacher; name a `teacher`")
        if self.teacher is None and self.student.shape is not None and self.student.tokenizer is None:
            mistakes.append("`student.shape` needs a `teacher`, for its tokenizer, or `student.tokenizer`")
        if self.teacher is not None and self.student.tokenizer is not None and not self.across_tokenizers:
            mistakes.append(
                "`student.tokenizer`: with a teacher the student uses the teacher's; "
                "to learn across tokenizers add the loss `cross_tokenizer`"
            )
        if self.student.tokenizer is not None and self.data.train is None:
            mistakes.append("`student.tokenizer` is trained on `data.train`, which is missing")
        if self.train.warmup >= self.train.steps:
            steps = self.train.steps
            mistakes.append(f"`train.warmup` {self.train.warmup} must be less than `train.steps` {steps}")
        shape, quantize = self.student.shape, self.quantize
        if shape is not None and quantize is not None:
            widths = (shape.hidden_size, shape.intermediate_size, shape.attention_size)
            if all(width % quantize.group_size for width in widths):
                size = quantize.group_size
                mistakes.append(f"`quantize.group_size` {size} divides no width of `student.shape` {widths}")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _check_teaching(self) -> list[str]:
        """Losses that this teacher, or no teacher, cannot give targets for."""
        terms = {name: MENU[name] for name in self.objective}
        if self.teacher is None:
            return [
                f"objective `{name}` needs a `teacher`" for name, loss in terms.items() if loss.needs_teacher
            ][:1]
        mistakes = []
        for place, teacher in self.teachers.items():
            if teacher.source == "cache":
                mistakes += [
                    f"`{place}.source` cache stores no hidden states, attention or text spans, which "
                    f"`objective.{name}` needs; use live"
                    for name, loss in terms.items()
                    if loss.family in ("hidden", "attention", "spans")
                ]
            if not teacher.tail:
                mistakes += [
                    f"`{place}.tail` false makes `objective.{name}` unsound: {NEEDS_TAIL[name]}"
                    for name in terms
                    if name in NEEDS_TAIL
                ]
        if not any(loss.family in ("token", "spans") for loss in terms.values()):
            mistakes += [
                f"`objective.{name}.balanced` weighs against losses on logits, and there are none; add one"
                for name, term in self.objective.items()
                if term.options.get("balanced")
            ]
        if any(teacher.top_k for teacher in self.teachers.values()) and len(self._temperatures) > 1:
            mistakes.append(
                "`objective`: with `teacher.top_k` all losses share one temperature, at which the likeliest "
                f"tokens and the rest are kept; got {', '.join(f'{t:g}' for t in sorted(self._temperatures))}"
            )
        return mistakes

    @property
    def teachers(self) -> dict[str, Teacher]:
        """All teachers, the one that answers first, by their place in the recipe."""
        if self.teacher is None:
            return {}
        others = {f"teacher.others.{i}": other for i, other in enumerate(self.teacher.others)}
        return {"teacher": self.teacher, **others}

    @property
    def across_tokenizers(self) -> bool:
        """Whether a teacher may have another tokenizer than the student."""
        return any(MENU[name].family == "spans" for name in self.objective)

    @property
    def _temperatures(self) -> set[float]:
        return {
            float(term.options.get("temperature", 1.0))
            for name, term in self.objective.items()
            if MENU[name].family == "token" and MENU[name].needs_teacher
        }

    @property
    def temperature(self) -> float:
        """At which the likeliest tokens of a teacher are kept."""
        return next(iter(self._temperatures), 1.0)


def _check_options(loss: str, options: dict[str, Any]) -> list[str]:
    """Mistakes in the options of a loss, by the types in the signature of its function."""
    known, place = options_of(loss), f"objective.{loss}"
    mistakes = [
        f"missing option `{place}.{key}`"
        for key, (_, default) in known.items()
        if default is ... and key not in options
    ]
    for key, value in options.items():
        if key not in known:
            near = nearest(key, [*known, "weight"], place.split("."))
            mistakes.append(f"unknown option `{place}.{key}`{near}")
            continue
        try:
            TypeAdapter(known[key][0], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(
                value
            )
        except ValidationError as error:
            mistakes.append(f"`{place}.{key}`: {wanted(error.errors()[0])}; got {shown(value)}")
    return mistakes


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides, and check all of it.

    Raises:
        NotFound: no such file.
        RecipeError: every mistake, one a line, each with the file, the path and the value seen.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"{path}: no such recipe; `mlx-distill recipes` lists the bundled ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error})") from None
    tree = parse_yaml(text, path)
    for override in overrides:
        _apply(tree, override)
    return decode(tree, path)


def decode(tree: dict[str, Any], where: str | Path = "recipe") -> Recipe:
    """Check a tree of plain values and freeze it as a `Recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {line}" for line in explain(error, Recipe))) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load` reads it back equal."""
    tree = recipe.model_dump(mode="json")
    tree["objective"] = {
        name: {"weight": term.weight, **term.options} for name, term in recipe.objective.items()
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def fingerprint(recipe: Recipe, *extra: str) -> str:
    """16 hex digits of SHA-256 over all that determines the student, and nothing else.

    Args:
        extra: what stands outside the recipe, such as digests of data files and weights.
    """
    text = json.dumps([determining(recipe), *extra], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def determining(recipe: Recipe) -> dict[str, Any]:
    """The options that determine the student, as plain values.

    What is watched, logged, saved and measured, and what happens to the finished student, may differ
    between runs of one fingerprint.
    """
    tree = recipe.model_dump(mode="json", exclude={"name", "quantize", "evaluate", "export"})
    for section, keys in {
        "data": ("valid", "test"),
        "train": ("log_every", "eval_every", "save_every"),
    }.items():
        for key in keys:
            del tree[section][key]
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: write section.key=value, such as train.steps=50")
    for depth, key in enumerate(keys[:-1]):
        child = tree.get(key)
        if child is None:
            child = tree[key] = {}
        elif isinstance(child, str) and keys[0] == "data":
            child = tree[key] = {"source": child}
        elif not isinstance(child, dict):
            path = ".".join(keys[: depth + 1])
            raise RecipeError(f"override {override!r}: `{path}` holds no keys of its own")
        tree = child
    tree[keys[-1]] = parse_value(value, f"override {override!r}")
