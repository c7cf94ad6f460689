"""What every rank but the first does: it reads what the recipe names, then waits for orders, asleep.

It has a folder of its own for the time being, to which rank 0 sends what a task reads; nothing of it stays.
"""

import io
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mlx_distill import __version__
from mlx_distill import recipe as recipes
from mlx_distill.answers import write_part
from mlx_distill.cache.capture import capture_part
from mlx_distill.console import Console
from mlx_distill.distributed import copies
from mlx_distill.distributed.links import Message
from mlx_distill.distributed.ranks import Ranks
from mlx_distill.distributed.watching import Forwarded
from mlx_distill.errors import DataError
from mlx_distill.generate import arguments, generate
from mlx_distill.guards import limit_memory
from mlx_distill.learning import learn, without_teacher
from mlx_distill.lessons import labels, lessons
from mlx_distill.models import divided, load
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.run import Run
from mlx_distill.teacher import Layers
from mlx_distill.work import Work


def agree(ranks: Ranks, prepared: Prepared) -> None:
    """All ranks go by rank 0's recipe, and must have read the same under its names.

    Raises:
        DataError: a rank has other data, other weights, or other versions of what computes.
        ModelError: a teacher cannot be divided among so many.
    """
    if ranks.size == 1:
        return
    if ranks.rank == 0:
        _same_versions(ranks)
        _check_divided(ranks, prepared)
        ranks.from_first(lambda: recipes.dump(prepared.recipe))
    prints = ranks.exchange(prepared.fingerprint)
    other = next((rank for rank, one in enumerate(prints) if one != prints[0]), None)
    if other is not None:
        raise DataError(
            f"rank {other} reads other data or other weights than rank 0 under the names of the recipe; "
            "copy rank 0's to its machine"
        )


def _same_versions(ranks: Ranks) -> None:
    """Refuse machines that would not understand each other, or compute something else."""
    found = ranks.exchange(
        {"mlx-distill": __version__, **{name: version(name) for name in ("mlx", "mlx-lm")}}
    )
    for rank, other in enumerate(found):
        for name, mine in found[0].items():
            if other[name] != mine:
                raise DataError(
                    f"rank {rank} has {name} {other[name]} and rank 0 {mine}; install the same on both"
                )


def _check_divided(ranks: Ranks, prepared: Prepared) -> None:
    """Refuse teachers that cannot be held in parts by so many; no weight is read."""
    for place, options in prepared.recipe.teachers.items():
        if options.parallel is not None and ranks.group is not None:
            model = load(options.model, f"{place}.model", lazy=True, trust=prepared.trust).model
            divided.divide(model, options.parallel, ranks.group, f"`{place}.model`")


def help_out(ranks: Ranks, *, trust: bool = False) -> None:
    """Do what rank 0 orders, until all is done."""
    assert ranks.watch is not None
    _same_versions(ranks)
    decided = recipes.decode(yaml.safe_load(ranks.from_first(lambda: None)))  # its memory decided, not ours
    prepared = prepare(decided, trust=trust)
    agree(ranks, prepared)
    limit_memory(decided.train)
    folder = Path(tempfile.mkdtemp(prefix=f"mlx-distill-rank-{ranks.rank}-"))
    ranks.watch.last_words = lambda why: shutil.rmtree(folder, ignore_errors=True)
    interrupts = Forwarded(ranks.watch.tell)
    try:
        with interrupts.caught():
            work = Work(Run(folder, Console(io.StringIO()), interrupts), decided, prepared, ranks=ranks)
            while (order := ranks.order()) is not None:
                task, part = order.value["task"], order.value["part"]
                ranks.reply(_do(work, task, part, order.data))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _do(work: Work, task: str, part: Any, data: bytes) -> Message:
    match task:
        case "find":
            return copies.find(work.run.folder, part)
        case "copy":
            return copies.write(work.run.folder, part, data)
        case "answers":
            return Message(write_part(work, part))
        case "capture":
            live = work.live_teacher(part["place"], Layers(part["manifest"]["hidden"]))
            assert live is not None
            return capture_part(live, part["rows"], part["manifest"], data)
        case "read":
            divided.read(work.teacher(part["place"]).model, data, part["shape"])
            return Message(None)
        case "write":
            generate(work.teacher(part.pop("place")).model, **arguments(part))
            return Message(None)
        case "unload":
            work.unload(part)
            return Message(None)
        case "learn":
            return _learn(work, part)
    raise ValueError(task)


def _learn(work: Work, stage: str) -> Message:
    recipe = without_teacher(work.recipe) if stage == "baseline" else work.recipe
    for place, teacher in recipe.teachers.items():
        if teacher.source == "cache" or place in recipe.self_taught:
            work.unload(place)
    learned = labels(work) if stage == "baseline" else lessons(work)
    student = work.new_student()._replace(tokenizer=work.prepared.tokenizer)
    learn(work, stage, student, learned, recipe, work.ranks)
    return Message(None)
