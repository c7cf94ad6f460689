"""Hidden states and attention of student and teachers, layer by layer: which are compared, and with what.

A loss of these families compares one layer with one layer. Here stand the pairs, the projections where
widths differ, and the mean over pairs and teachers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distill.cache.reader import Outline
from mlx_distill.data.batch import at_places
from mlx_distill.keys import seed_global
from mlx_distill.losses import Targets
from mlx_distill.losses.features import make_projections, project
from mlx_distill.losses.layer_maps import layer_pairs
from mlx_distill.losses.menu import MENU, option
from mlx_distill.models.taps import tapped
from mlx_distill.options import Term
from mlx_distill.teacher import Layers

HUNG_ON = "projections"  # the student's attribute that holds them while it trains


class Compared(NamedTuple):
    """A teacher whose layers are compared with the student's."""

    place: int  # among the targets of a batch
    share: float  # of those compared; they add up to 1
    model: Any  # of a cached teacher, its `Outline`


def pairs_of(terms: Mapping[str, Term], student: int, teacher: int) -> dict[str, list[tuple[int, int]]]:
    """Loss -> pairs of a student's and a teacher's layer, for models of so many layers.

    Raises:
        ValueError: a map that these models do not allow.
    """
    return {
        name: layer_pairs(
            option(name, term.options, "layers"),
            student,
            teacher,
            embeddings=MENU[name].family == "hidden",
        )
        for name, term in terms.items()
        if MENU[name].family in ("hidden", "attention")
    }


def teacher_layers(terms: Mapping[str, Term], student: int, teacher: int) -> Layers:
    """What a teacher has to show."""
    return _layers(pairs_of(terms, student, teacher), 1)


def _layers(pairs: Mapping[str, list[tuple[int, int]]], side: int) -> Layers:
    """Layers of one side of the pairs, by family."""
    of = {"hidden": set(), "attention": set()}
    for name, both in pairs.items():
        of[MENU[name].family] |= {pair[side] for pair in both}
    return Layers(of["hidden"], of["attention"])


class Matching:
    """Compares layers of a student with those of its teachers.

    Where a teacher's hidden states are wider or narrower, each pair gets a learned projection, hung on
    the student so that it trains and is kept in checkpoints with it; `strip` takes them off again.
    """

    def __init__(self, terms: Mapping[str, Term], student: Any, teachers: Sequence[Compared], seed: int):
        self.terms, self.model, self.teachers = terms, student, teachers
        self.pairs = [pairs_of(terms, len(student.layers), len(one.model.layers)) for one in teachers]
        seen = [_layers(pairs, 0) for pairs in self.pairs]
        self.student_layers = Layers(
            {n for one in seen for n in one.hidden}, {n for one in seen for n in one.attention}
        )
        seed_global(seed, "projections")
        projections: dict[str, Any] = {}
        for one, pairs in zip(teachers, self.pairs, strict=True):
            for name, both in pairs.items():
                if MENU[name].family == "hidden":
                    widths = [_width(model, both[0][side]) for side, model in enumerate((student, one.model))]
                    made = make_projections(both, *widths)
                    if made is not None:
                        projections[f"{name} {one.place}"] = made
        if projections:
            student[HUNG_ON] = projections
            mx.eval(student[HUNG_ON])

    def values(self, seen: Any, places: mx.array, targets: Sequence[Targets]) -> dict[str, mx.array]:
        """Loss -> its value at each counted place, (1, N): the mean over pairs and teachers."""
        found: dict[str, mx.array] = {}
        for one, pairs in zip(self.teachers, self.pairs, strict=True):
            for name, both in pairs.items():
                each = [
                    self._value(name, one, i, pair, seen, places, targets[one.place])
                    for i, pair in enumerate(both)
                ]
                mean = sum(each, mx.array(0.0)) * (one.share / len(both))
                found[name] = found[name] + mean if name in found else mean
        return found

    def _value(
        self,
        name: str,
        teacher: Compared,
        index: int,
        pair: tuple[int, int],
        seen: Any,
        places: mx.array,
        targets: Targets,
    ) -> mx.array:
        loss, (ours, theirs) = MENU[name], pair
        options = {key: value for key, value in self.terms[name].options.items() if key in loss.own_options}
        if loss.family == "attention":
            assert targets.attention is not None
            values = loss.function(seen.attention[ours], targets.attention[str(theirs)], **options)
            return at_places(values, places)
        assert targets.hidden is not None
        hidden = at_places(seen.hidden[ours], places)
        projections = self.model.get(HUNG_ON, {}).get(f"{name} {teacher.place}")
        if projections is not None:
            hidden = project(projections, index, hidden)
        return loss.function(hidden, targets.hidden[str(theirs)], **options)


def strip(student: Any) -> None:
    """Take the projections off a student, which then is an ordinary model again."""
    student.pop(HUNG_ON, None)


def _width(model: Any, layer: int) -> int:
    """Of the hidden states behind a layer; nothing is computed for it."""
    if isinstance(model, Outline):
        return model.widths[layer]
    with tapped(model, hidden=[layer]) as seen:
        model(mx.zeros((1, 1), dtype=mx.int32))
    return seen.hidden[layer].shape[-1]
