"""A recipe: what a run is made of. Every option stands in `options/`; here they are put together.

`load` reads strict YAML, applies `section.key=value` overrides and returns a frozen `Recipe`, or
raises one `RecipeError` that lists every mistake with its path.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.losses.menu import MENU, options_of
from mlx_distill.mistakes import explain, nearest, shown, wanted
from mlx_distill.odd_files import odd
from mlx_distill.options import (
    Compress,
    Data,
    Evaluate,
    Export,
    Generate,
    Quantize,
    Section,
    Student,
    Teacher,
    Term,
    Train,
)
from mlx_distill.recipe_checks import contradictions
from mlx_distill.strict_yaml import LARGEST, parse_value, parse_yaml


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
    compress: Compress | None = None  # null: one size

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
        if mistakes := contradictions(self):
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def teachers(self) -> dict[str, Teacher]:
        """All teachers, the one that answers first, by their place in the recipe."""
        if self.teacher is None:
            return {}
        others = {f"teacher.others.{i}": other for i, other in enumerate(self.teacher.others)}
        return {"teacher": self.teacher, **others}

    @property
    def self_taught(self) -> list[str]:
        """Places of the teachers that are the student: as it is before training, or its moving average."""
        return [place for place, teacher in self.teachers.items() if teacher.model == "student"]

    @property
    def all_own(self) -> bool:
        """Whether the student learns from its own answers alone, and no row of the data needs one."""
        own = self.generate.on_policy
        return own is not None and own.share == 1 and own.schedule == "constant"

    @property
    def across_tokenizers(self) -> bool:
        """Whether a teacher may have another tokenizer than the student."""
        return any(MENU[name].family == "spans" for name in self.objective)

    @property
    def temperatures(self) -> set[float]:
        """Those at which losses compare tokens with a teacher."""
        return {
            float(term.options.get("temperature", 1.0))
            for name, term in self.objective.items()
            if MENU[name].family == "token" and MENU[name].needs_teacher
        }

    @property
    def temperature(self) -> float:
        """At which the likeliest tokens of a teacher are kept."""
        return next(iter(self.temperatures), 1.0)


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
    if what := odd(path):
        raise RecipeError(f"{path}: {what}, and no file; save the recipe in a file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)  # more is refused, and need not be read
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
    tree = recipe.model_dump(mode="json", exclude={"name", "quantize", "evaluate", "export", "compress"})
    own = recipe.generate.on_policy
    adaptive = own is not None and own.schedule == "adaptive"
    heeded = {("data", "valid"), ("train", "eval_every")} if adaptive else set()
    for section, keys in {
        "data": ("valid", "test"),
        "train": (
            *("log_every", "eval_every", "save_every", "keep", "log_to", "spike", "memory_gib"),
            "skip_nonfinite",  # it ends a run or does not, and a student that is finished is the same
        ),
    }.items():
        for key in keys:
            if (section, key) not in heeded:
                del tree[section][key]
    for teacher in [tree["teacher"], *tree["teacher"]["others"]] if tree["teacher"] else []:
        del teacher["cache"], teacher["parallel"]  # where targets are stored, and on how many machines made
    if tree["generate"]["endpoint"] is not None:  # where the model answers, and how it is asked
        tree["generate"]["endpoint"] = {key: tree["generate"]["endpoint"][key] for key in ("model", "chat")}
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
