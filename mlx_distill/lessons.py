"""What the student learns from: the user's labels, what the teacher answered, and replayed rows.

And in which batches: `make_batches` takes every row equally often, or as `weight` and `train.curriculum` say.
"""

from typing import NamedTuple

import numpy as np

from mlx_distill.asked import answered
from mlx_distill.data.batch import Batches, Encoded, width_of
from mlx_distill.data.curriculum import paced
from mlx_distill.data.drawn import DrawnBatches, steady
from mlx_distill.data.mixture import learned_from, shares
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.reasoning import Task, as_learned, weigh
from mlx_distill.recipe import Recipe
from mlx_distill.work import Work


class Lessons(NamedTuple):
    """Rows to learn from, as text and as tokens, and the key of `data` that each comes from."""

    rows: list[Row]
    encoded: list[Encoded]
    sources: list[str]  # "train", "prompts", "replay.0", ...
    prompts: list[int | None]  # which of `Prepared.prompts` it answers; None where the user did


def labels(work: Work) -> Lessons:
    """The rows that the user answered, replayed ones last: what the baseline learns from."""
    return _weighed(work, *_labels(work))


def _labels(work: Work) -> tuple[Lessons, list[Task]]:
    """The same without weights, and what each row teaches."""
    prepared = work.prepared
    found, tasks = Lessons([], [], [], []), list[Task]()
    for source, (rows, encoded) in {
        "train": (prepared.train_rows, prepared.train),
        **prepared.replay,
    }.items():
        found.rows.extend(rows)
        found.encoded.extend(encoded)
        found.sources.extend([source] * len(rows))
        found.prompts.extend([None] * len(rows))
        tasks += prepared.tasks[source]
    return found, tasks


def lessons(work: Work) -> Lessons:
    """The user's labels and what is replayed, then the answers to `data.prompts` that were kept.

    An answer in the student's own vocabulary is learned as the very tokens that were written, the end of
    the turn included; another is encoded anew, and so is what `data.reasoning` makes of one.
    """
    (found, tasks), prepared = _labels(work), work.prepared
    if not prepared.prompts or work.recipe.all_own:
        return _weighed(work, found, tasks)
    foreign = bool(prepared.teachers) and prepared.teachers["teacher"].foreign
    count = work.recipe.data.count
    for written in work.run.read_rows("generated"):
        if not written["kept"]:
            continue
        asked = prepared.prompts[written["row"]]
        for row, task in as_learned(answered(asked.row, written["answer"]), work.recipe.data.reasoning):
            if foreign or written["end"] is None or task != "both":  # a server writes text
                new = encode(row, prepared.tokenizer, count=count)
            else:
                start = 1 if count == "all" else max(1, len(asked.tokens))
                new = Encoded([*asked.tokens, *written["tokens"], written["end"]], start)
            found.rows.append(row)
            found.encoded.append(new)
            found.sources.append("prompts")
            found.prompts.append(written["row"])
            tasks.append(task)
    return _weighed(work, found, tasks)


def _weighed(work: Work, found: Lessons, tasks: list[Task]) -> Lessons:
    return found._replace(encoded=weigh(found.encoded, tasks, work.recipe.data.reasoning))


def make_batches(
    learned: Lessons, recipe: Recipe, difficulties: np.ndarray | None = None
) -> Batches | DrawnBatches:
    """The batches of a training run over these rows, in the order that the recipe asks for.

    Args:
        difficulties: of each row, for `train.curriculum`; None: without it.
    """
    rows, options = learned.encoded, recipe.train
    weights = {key: source.weight for key, source in learned_from(recipe.data).items()}
    there = set(learned.sources)
    weighted = len(there) > 1 and any(weights[source] is not None for source in there)
    if not weighted and difficulties is None:
        return Batches(rows, options.batch_tokens, recipe.seed)
    sources = learned.sources if weighted else ["all"] * len(rows)
    share = shares(sources, weights)
    total = options.steps * options.micro_batches
    rates = steady(share)
    if difficulties is not None:
        assert options.curriculum is not None
        costs = np.array([width_of(len(row.tokens)) for row in rows])
        rates = paced(options.curriculum, difficulties, share, sources, costs, recipe.seed)
    return DrawnBatches(rows, options.batch_tokens, recipe.seed, total=total, rates=rates, sources=sources)
