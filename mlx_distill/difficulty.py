"""How difficult each row is, for `train.curriculum`: measured once before training, and kept.

- length: counted tokens.
- teacher_nll: mean nats a counted token under the first teacher, in its own tokens if these are others.
- student_loss: the same under the student before training.
- pass_rate: share of the answers to the row's prompt that were wrong, as `filters.verified` found them. A row
  that answers no prompt (labels, replay) counts as the mean of all prompts.
"""

from statistics import fmean
from typing import Any

import numpy as np

from mlx_distill.data.template import encode
from mlx_distill.errors import DataError
from mlx_distill.filters import FILTERS
from mlx_distill.lessons import Lessons, lessons
from mlx_distill.score import nll_of_rows
from mlx_distill.work import Work

FILE = "difficulty"  # in `samples/`


def score_rows(work: Work) -> dict[str, Any]:
    """Measure every row and write `samples/difficulty.jsonl`, if the recipe has a curriculum.

    Raises:
        DataError: one row alone, which has no order.
    """
    options = work.recipe.train.curriculum
    if options is None:
        return {}
    learned = lessons(work)
    if len(learned.rows) < 2:
        raise DataError(
            "`train.curriculum` orders rows, and there is one to learn from; add rows, or drop it"
        )
    found = {
        "length": _lengths,
        "teacher_nll": _teacher_nll,
        "student_loss": _student_loss,
        "pass_rate": _wrong_shares,
    }[options.by](work, learned)
    work.run.write_rows(
        FILE,
        [
            {"difficulty": difficulty, "source": source, "prompt": row.question()}
            for difficulty, source, row in zip(found.tolist(), learned.sources, learned.rows, strict=True)
        ],
    )
    easiest, middle, hardest = np.quantile(found, [0, 0.5, 1])
    said = f"{easiest:.3g} to {hardest:.3g}, {middle:.3g} in the middle"
    if easiest == hardest:
        said = f"{easiest:.3g} for every row, so their order is left to chance"
    work.run.console.say(f"difficulty by {options.by}: {said}")
    return {"by": options.by, "rows": len(found)}


def difficulties(work: Work) -> np.ndarray | None:
    """What `score_rows` found for each row of `lessons`, (rows,) float64; None without a curriculum."""
    if work.recipe.train.curriculum is None:
        return None
    return np.array([line["difficulty"] for line in work.run.read_rows(FILE)], dtype=np.float64)


def _lengths(work: Work, learned: Lessons) -> np.ndarray:
    return np.array([len(row.tokens) - row.start for row in learned.encoded], dtype=np.float64)


def _teacher_nll(work: Work, learned: Lessons) -> np.ndarray:
    files, rows = work.prepared.teachers["teacher"], learned.encoded
    if files.foreign:
        rows = [encode(row, files.tokenizer, count=work.recipe.data.count) for row in learned.rows]
    model = work.teacher().model
    return nll_of_rows(model, rows, files.vocabulary, title="difficulty", progress=work.run.progress)


def _student_loss(work: Work, learned: Lessons) -> np.ndarray:
    model, size = work.new_student().model, work.prepared.vocabulary
    return nll_of_rows(model, learned.encoded, size, title="difficulty", progress=work.run.progress)


def _wrong_shares(work: Work, learned: Lessons) -> np.ndarray:
    named = list(FILTERS)
    later = {*named[named.index("verified") + 1 :], "keep"}  # what they drop had been found right
    found: dict[int, list[bool]] = {}
    for line in work.run.read_rows("generated"):
        right = line["kept"] or line["reason"].partition(":")[0] in later
        found.setdefault(line["row"], []).append(not right)
    wrong = {prompt: fmean(answers) for prompt, answers in found.items()}
    mean = fmean(wrong.values())
    return np.array([mean if prompt is None else wrong[prompt] for prompt in learned.prompts])
