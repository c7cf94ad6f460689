"""The first minute of a run: teachers and student are tried before anything long.

What was found stands in `probes.json`, so that a run which goes on does not try again. Nothing that a stage
uses later is changed: the student is thrown away, and MLX's random state is put back.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_distill.files import write_json
from mlx_distill.models import Loaded
from mlx_distill.peak import PeakMemory
from mlx_distill.plain_json import parse_object
from mlx_distill.probes.judging import (
    check_finite,
    largest_difference,
    nll_of,
    probe_batch,
    sample,
    worth,
)
from mlx_distill.probes.longest import Largest, largest_batch
from mlx_distill.probes.stand_in import stand_in
from mlx_distill.probes.step import check_numbers, is_stored, make_room, stored_targets, try_step
from mlx_distill.teacher import Teaches
from mlx_distill.work import Work

FILE = "probes.json"


class Probes:
    """What is tried once a run, each as soon as its models are there."""

    def __init__(self, work: Work, memory: PeakMemory):
        self.work, self.memory, self.path = work, memory, work.run.folder / FILE
        try:
            self.found: dict[str, Any] = parse_object(self.path.read_bytes(), finite=True)
        except (OSError, ValueError):
            self.found = {}

    def before(self, stage: str) -> None:
        """Try what is due before a stage: all before the first; a student that is cut out, before it trains.

        In the place of the latter a model of its sizes takes the first step: memory asks for no more.

        Raises:
            DistillError: what cannot go well.
        """
        recipe = self.work.recipe
        if "train" in self.work.run.stages():
            return
        if "teachers" not in self.found and recipe.teachers:
            self._keep("teachers", self._teachers)
        if recipe.student.prune is not None and stage != "train":
            if "stand_in" not in self.found:
                self._keep("stand_in", self._stand_in)
        elif "student" not in self.found:
            self._keep("student", self._student)

    def _keep(self, key: str, work: Any) -> None:
        name = "probes of teachers" if key == "teachers" else "probes"
        with self.memory.of(name), random_state_kept(), self.work.run.console.progress(name, 1, "probe"):
            found = work()
        self.found[key] = found
        if key != "teachers":
            self._tell(found)
        write_json(self.path, self.found)

    def _teachers(self) -> dict[str, Any]:
        """Of each teacher that is a model of its own: whether it repeats itself, and its nats a token.

        One of which all is stored is not loaded for that.
        """
        work, found = self.work, {}
        prepared, rows = work.prepared, sample(work.prepared)
        for place in [one for one in work.recipe.teachers if one not in work.recipe.self_taught]:
            if is_stored(work, place):
                found[place] = {"stored": True}
                continue
            files = prepared.teachers[place]
            make_room(work, place)
            loaded = work.teacher(place)
            loaded.model.eval()
            # Any ids will do, where the teacher has others than the student.
            tokens = mx.minimum(probe_batch(prepared), files.vocabulary - 1)
            apart = largest_difference(loaded.model, tokens, f"{place}.model")
            if apart and work.recipe.teachers[place].source != "cache":
                self._say(
                    f"`{place}.model` is not deterministic: the same batch twice gave logits up to "
                    f"{apart:.2g} apart, so a run that is resumed may end with other bits; "
                    f"`{place}.source: cache` asks it once"
                )
            found[place] = {"largest_difference": apart}
            if rows is not None:
                own = files.tokenizer if files.foreign else None
                found[place]["nll"] = nll_of(loaded, rows, files.vocabulary, own=own)
        return found

    def _student(self) -> dict[str, Any]:
        """The student before training: its nats a token, and a step on the largest batch."""
        work, found = self.work, dict[str, Any]()
        prepared, rows = work.prepared, sample(work.prepared)
        largest = largest_batch(work)
        with stored_targets(work, largest) as stored:
            student = work.new_student()._replace(tokenizer=prepared.tokenizer)
            logits = student.model(probe_batch(prepared))[..., : prepared.vocabulary]
            check_finite(logits, "student" if work.recipe.student.model is None else "student.model")
            del logits
            if rows is not None:
                found["nll"] = nll_of(student, rows, prepared.vocabulary)
                for place, told in self.found.get("teachers", {}).items():
                    if "nll" in told and (line := worth(f"{place}.model", told["nll"], found["nll"], rows)):
                        self._say(line)
            tried = self._step(student, largest, stored)
        check_numbers(tried["losses"], tried["gradient_norm"], work.recipe.objective, largest.told())
        return found | tried

    def _stand_in(self) -> dict[str, Any]:
        """A step on the largest batch of a model as large as the student that is yet to be cut out."""
        largest = largest_batch(self.work)
        with stored_targets(self.work, largest) as stored:
            for place in self.work.recipe.self_taught:
                self.work.take(place, stand_in(self.work, "full"))
            tried = self._step(stand_in(self.work), largest, stored)
        return {key: tried[key] for key in ("rows", "width", "seconds")}  # its losses mean nothing

    def _step(self, student: Loaded, largest: Largest, stored: Mapping[str, Teaches]) -> dict[str, Any]:
        """What a step took, and what was made of it."""
        work = self.work
        self._warn(largest)
        mx.clear_cache()  # or what reading has freed would count as memory of the step
        try:
            tried = try_step(work, student, largest, stored)
        finally:
            for place in work.recipe.self_taught:
                work.unload(place)  # they are the student that is thrown away
            make_room(work)
        rows, width = largest.batch.tokens.shape
        return {"rows": rows, "width": width, **tried._asdict()}

    def _warn(self, largest: Largest) -> None:
        """A line before a step that may be too much: a process that is ended can say nothing more."""
        predicted = self.memory.predicted
        if predicted.together > predicted.machine / 2:
            self._say(
                f"trying the largest batch, {largest.told()}, at a predicted {predicted.together:.2g} of "
                f"{predicted.machine:.3g} GiB; if the process ends here, lower `train.batch_tokens`"
            )

    def _tell(self, found: dict[str, Any]) -> None:
        """A line on the step, its memory beside what was predicted."""
        gib, predicted = self.memory.measured("probes"), self.memory.predicted
        found["peak_gib"] = gib
        whole = f"all of training, predicted: {predicted.together:.2g}"
        took = "" if gib is None else f", {gib:.2g} GiB ({whole})"
        losses = [f"{name} {value:.3f}" for name, value in found.get("losses", {}).items()]
        what = "  ".join(losses) or "by a model as large as the student that is to be cut out"
        self._say(
            f"the largest batch, {found['rows']} x {found['width']} tokens, takes {found['seconds']:.1f} s"
            f"{took}: {what}"
        )
        if gib is not None and gib > predicted.machine:
            self._say(
                f"this is more than the {predicted.machine:.3g} GiB that the machine lends, so it may become "
                "slow, or stop; lower `train.batch_tokens`, or set `train.gradient_checkpointing: true`"
            )

    def _say(self, line: str) -> None:
        self.work.run.console.say(f"probes: {line}")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put MLX's global random state back at the end, to the bit."""
    state: Any = mx.random.state
    first, second = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed((first << 32) | second)
