"""Which layer of the student learns from which layer of the teacher.

Layers are numbered from 1; number n is the output of the n-th layer, and 0 what the first one reads.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _check(value: Any) -> Any:
    """One mistake in place of pydantic's several, one for each kind that a union allows."""
    if isinstance(value, str):
        known = value in ("last", "uniform", "every_other", "all")
    else:
        known = isinstance(value, list) and bool(value) and all(_is_pair(pair) for pair in value)
    if not known:
        raise ValueError(
            "last, uniform, every_other, all, or a list of [student layer, teacher layer] pairs such as "
            "[[2, 4], [4, 8]]",
        )
    return value


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)


Layers = Annotated[
    Literal["last", "uniform", "every_other", "all"] | list[list[int]],
    BeforeValidator(_check),
]


def layer_pairs(
    layers: Layers, student_layers: int, teacher_layers: int, *, embeddings: bool = False
) -> list[tuple[int, int]]:
    """Pairs of a student's and a teacher's layer, in the student's order.

    Args:
        layers: last: the last of each (MiniLM, Wang et al. 2020, section 3).
            uniform: each student layer i learns from teacher layer i * teacher_layers / student_layers,
            rounded half up and at least 1 (TinyBERT, Jiao et al. 2020, section 3.1).
            every_other: every second teacher layer, counted back from its last (DistilBERT, Sanh et al. 2019,
            section 3); the student has half as many, rounded up or down.
            all: one to one, between equally deep models (MobileBERT, Sun et al. 2020, section 3).
            A list: these [student layer, teacher layer] pairs, as they stand.
        student_layers, teacher_layers: how many each has.
        embeddings: layer 0 counts: presets but `last` begin with (0, 0), as in TinyBERT, and a list may
            name it. For losses on hidden states alone: what the first layer reads has no attention.

    Raises:
        ValueError: the depths do not allow the preset, or a pair is beyond a model or stands twice.
    """
    if not isinstance(layers, str):
        return _named(layers, student_layers, teacher_layers, first=0 if embeddings else 1)
    numbers = range(1, student_layers + 1)
    depths = f"the student has {_count(student_layers)} and the teacher {_count(teacher_layers)}"
    match layers:
        case "last":
            return [(student_layers, teacher_layers)]
        case "uniform":
            half = student_layers // 2
            pairs = [(i, max(1, (i * teacher_layers + half) // student_layers)) for i in numbers]
        case "every_other":
            if abs(teacher_layers - 2 * student_layers) > 1:
                raise ValueError(
                    f"layers every_other: {depths}, not about twice as many; use uniform or list pairs"
                )
            pairs = [(i, teacher_layers - 2 * (student_layers - i)) for i in numbers]
        case "all":
            if student_layers != teacher_layers:
                raise ValueError(f"layers all: {depths}, not as many; use uniform or list pairs")
            pairs = [(i, i) for i in numbers]
    return [(0, 0), *pairs] if embeddings else pairs


def _named(
    layers: list[list[int]], student_layers: int, teacher_layers: int, first: int
) -> list[tuple[int, int]]:
    pairs = [(ours, theirs) for ours, theirs in layers]
    for ours, theirs in pairs:
        if not (first <= ours <= student_layers and first <= theirs <= teacher_layers):
            raise ValueError(
                f"layers [{ours}, {theirs}]: the student's layers are {first} to {student_layers} and the "
                f"teacher's {first} to {teacher_layers}; choose a pair within"
            )
        if pairs.count((ours, theirs)) > 1:
            raise ValueError(f"layers [{ours}, {theirs}] stands twice; name each pair once")
    return pairs


def _count(layers: int) -> str:
    return f"{layers} layer" if layers == 1 else f"{layers} layers"
