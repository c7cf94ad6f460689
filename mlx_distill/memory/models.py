"""The models of a recipe: how large they are, and what of them moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_distill.memory.sizes import Sizes, adapter_numbers, numbers_of, sizes_of
from mlx_distill.models.headers import Stored, config_of, stored_sizes
from mlx_distill.options import Teacher
from mlx_distill.prune.axes import count_of, shapes_of
from mlx_distill.prune.plan import Planned
from mlx_distill.quantize.teacher import rounded_bytes
from mlx_distill.recipe import Recipe


class Models(NamedTuple):
    """The student, the teachers by their place, and what is cut out of another model."""

    student: Sizes  # as it trains
    moving: float  # numbers that move in it
    adapted: float  # share of its layers that keep something for the backward pass
    scaled: bool  # the matrices of these have a length that moves: DoRA
    teachers: dict[str, Sizes]  # those that have weights of their own
    source: Sizes | None  # what the student is cut out of


def models_of(
    recipe: Recipe, folders: Mapping[str, Path], vocabulary: int, planned: Planned | None
) -> Models:
    """Sizes of all models of a recipe, from shapes and the headers of files.

    Args:
        folders: of the models that are loaded, by `student` and the teachers' places.
    """
    options = recipe.student
    stored = {place: stored_sizes(folder) for place, folder in folders.items()}
    configs = {place: config_of(folder) for place, folder in folders.items()}
    source = None
    if planned is not None:
        whole = stored["student"]
        source = sizes_of(configs["student"], whole.numbers, whole.bytes, vocabulary, whole.each)
        numbers = count_of(planned.config)
        stored["student"] = Stored(
            int(numbers * whole.bytes / whole.numbers), numbers, shapes_of(planned.config), whole.each
        )
        configs["student"] = planned.config
    if options.shape is not None:
        numbers = numbers_of(options.shape, vocabulary)
        student = sizes_of(options.shape.model_dump(), numbers, 4.0 * numbers, vocabulary)
    else:
        found = stored["student"]
        student = sizes_of(configs["student"], found.numbers, found.bytes, vocabulary, found.each)
    moving, adapted = student.numbers, 1.0
    if options.method == "full":
        # In float32, whatever they are stored in.
        student = student._replace(bytes=4.0 * student.numbers, each=4.0)
    else:
        moving = adapter_numbers(options, stored["student"], configs["student"])
        adapted = min(1.0, (options.layers or student.layers) / max(1, student.layers))
        student = student._replace(bytes=student.bytes + 4.0 * moving)
    teachers = {}
    for place, teacher in recipe.teachers.items():
        if place in recipe.self_taught:
            if teacher.ema is None and options.method != "full":
                continue  # a student with adapters lends its own weights
            moved = 4.0 * moving if teacher.ema is not None else 4.0 * student.numbers
            teachers[place] = student._replace(bytes=moved)
        else:
            teachers[place] = _teacher(teacher, stored[place], configs[place], vocabulary)
    return Models(student, moving, adapted, options.method == "dora", teachers, source)


def _teacher(teacher: Teacher, stored: Stored, config: Mapping[str, object], vocabulary: int) -> Sizes:
    held = float(stored.bytes)
    if teacher.quantize is not None:
        held = rounded_bytes(stored, teacher.quantize)
    return sizes_of(config, stored.numbers, held, vocabulary, stored.each)
