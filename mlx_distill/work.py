"""What the stages of one run share."""

import gc
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_distill import models
from mlx_distill.distributed import ALONE, Ranks
from mlx_distill.distributed.links import Message
from mlx_distill.files import make_folder, write_bytes, write_folder
from mlx_distill.models import Loaded
from mlx_distill.models.divided import divide, hold
from mlx_distill.preflight import Prepared
from mlx_distill.prune.vocabulary import with_vocabulary
from mlx_distill.quantize.teacher import in_few_bits
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.self_teacher import without_adapters
from mlx_distill.student import make_student
from mlx_distill.teacher import Layers, LiveTeacher

PROBE = 64  # tokens; logits of all positions are kept
PRUNED = "pruned"  # folder in `models/` of a student that was cut out, as it is before training


@dataclass
class Work:
    """A run that is going on: its folder, its recipe, its data, and the teachers once they are loaded."""

    run: Run
    recipe: Recipe
    prepared: Prepared
    unsafe: bool = False  # the user lets programs that models wrote run where no sandbox holds them
    ranks: Ranks = ALONE  # this process among those of the run
    _loaded: dict[str, Loaded] = field(default_factory=dict)

    def teacher(self, place: str = "teacher") -> Loaded:
        """A teacher, by its place in the recipe, loaded when first needed."""
        if place not in self._loaded:
            name = self.recipe.teachers[place].model
            if place in self.recipe.self_taught:
                student = self.new_student("full")._replace(tokenizer=self.prepared.tokenizer)
                self._loaded[place] = student
            else:
                if self.is_divided(place):
                    return self._divided(place)
                grid = self.recipe.teachers[place].quantize
                loaded = models.load(name, f"{place}.model", lazy=grid is not None, trust=self.prepared.trust)
                if grid is not None:
                    loaded = in_few_bits(loaded, grid)
                if self.prepared.kept_tokens is not None:  # last: it runs the model, which then is in memory
                    loaded = with_vocabulary(loaded, self.prepared.tokenizer, self.prepared.kept_tokens)
                self._loaded[place] = loaded
        return self._loaded[place]

    def is_divided(self, place: str) -> bool:
        """Whether the ranks hold a teacher in parts, and run it together."""
        return self.recipe.teachers[place].parallel is not None and self.ranks.size > 1

    def _divided(self, place: str) -> Loaded:
        """This rank's part of a teacher. On rank 0 it is used as a whole one, and the others follow."""
        how, ranks = self.recipe.teachers[place].parallel, self.ranks
        assert how is not None
        assert ranks.group is not None
        load = partial(models.load, self.recipe.teachers[place].model, f"{place}.model", lazy=True)
        loaded, again = load(trust=self.prepared.trust), load(trust=self.prepared.trust)

        def tell(task: str, told: dict[str, Any], data: bytes, here: Callable[[], Any]) -> Any:
            made: list[Any] = []
            orders = [{"place": place, **told}] * ranks.size
            ranks.share(task, orders, lambda _: Message(made.append(here())), data)
            return made[0]

        divide(loaded.model, how, ranks.group, f"`{place}.model`")
        hold(loaded.model, again.model, ranks.group, tell if ranks.rank == 0 else None)
        self._loaded[place] = loaded
        return loaded

    def lend(self, student: Loaded) -> None:
        """Let the model under a student's adapters be the teachers that are the student before training.

        It then takes no memory of its own. A student all of whose weights move lends nothing.
        """
        if self.recipe.student.method != "full" and self.recipe.self_taught:
            base = student._replace(model=without_adapters(student.model))
            self._loaded |= dict.fromkeys(self.recipe.self_taught, base)

    def take(self, place: str, loaded: Loaded) -> None:
        """Let a model be a teacher, in place of the one that would be loaded."""
        self._loaded[place] = loaded

    def unload(self, place: str) -> None:
        """Free a teacher's memory, once nothing else holds it."""
        loaded = self._loaded.pop(place, None)
        if loaded is not None and self.is_divided(place) and self.ranks.rank == 0:
            self.ranks.share("unload", [None, *[place] * (self.ranks.size - 1)])
        del loaded
        gc.collect()  # compiled functions hold their teacher in a circle, and its memory is not Python's

    def live_teacher(self, place: str = "teacher", layers: Layers | None = None) -> LiveTeacher | None:
        """A teacher that runs; None where the recipe has none."""
        if place not in self.recipe.teachers:
            return None
        return LiveTeacher(self.teacher(place), self.prepared.teachers[place].vocabulary, layers)

    def comparable_teacher(self) -> LiveTeacher | None:
        """The teacher that a student's distributions can be compared with: None if its tokens are others."""
        first = self.prepared.teachers.get("teacher")
        return None if first is None or first.foreign else self.live_teacher()

    def save(self, name: str, loaded: Loaded) -> None:
        """Write `models/NAME`, and beside it what the model in memory computes for the probe.

        A signal waits until both are there: what was trained since the last checkpoint is in no other place.
        """
        with self.run.interrupts.deferred():
            write_folder(self.run.model(name), lambda folder: models.save(folder, loaded))
            make_folder(self.run.folder / "probes")
            content = io.BytesIO()
            np.save(content, self.probed(loaded))
            write_bytes(self.run.folder / "probes" / f"{name}.npy", content.getvalue())

    def probed(self, loaded: Loaded) -> np.ndarray:
        """Logits (T, V) in float32 for the probe."""
        return np.array(loaded.model(mx.array(self.probe())[None])[0].astype(mx.float32))

    def probe(self) -> list[int]:
        """Token ids by which a saved model is compared with the one in memory: the first row there is.

        Not of `data.test`, which may be another when a run goes on.
        """
        rows = self.prepared.train
        tokens = rows[0].tokens if rows else self.prepared.prompts[0].tokens
        return tokens[:PROBE]

    def new_student(self, method: Literal["full", "lora", "dora"] | None = None) -> Loaded:
        """The student before training. A loaded one still has its own tokenizer and chat template.

        Args:
            method: which parameters move; None: as the recipe says.
        """
        options = self.recipe.student
        if method is not None:
            options = options.model_copy(update={"method": method})
        if options.prune is not None:  # the stage `prune` has cut it out
            options = options.model_copy(update={"prune": None, "model": str(self.run.model(PRUNED))})
        return make_student(options, self.prepared.tokenizer, self.recipe.seed, trust=self.prepared.trust)
