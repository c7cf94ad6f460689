"""What happens to the finished student: fewer bits, evidence, what is left, several sizes of it."""

from typing import Any, Literal, Self, get_args

from pydantic import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mlx_distill.options.generate import Sampling
from mlx_distill.options.grid import check_grid, filled
from mlx_distill.options.section import Bits, Fraction, Section, Share


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

    tasks: list[
        Literal["fidelity", "code", "summary", "exact", "choice", "humaneval", "mbpp", "harness", "speed"]
    ] = ["fidelity", "speed"]  # what each needs: docs/evaluation.md
    files: dict[Literal["humaneval", "mbpp"], str] = {}  # of humaneval, mbpp: a file or a Hub data set
    limit: PositiveInt | None = None  # problems of humaneval, mbpp and each harness task, the first ones
    harness: list[str] = []  # names of tasks of lm-evaluation-harness, for `tasks: [harness]`
    prompt_lengths: list[PositiveInt] = [128, 512]  # tokens of the prompts on which speed is measured
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
