"""Everything that a recipe asks to know about one model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.code import pass_at_1
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.fresh import fresh_look
from mlx_distill.evaluate.summary import rouge
from mlx_distill.generate import generate
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.progress import Progress, silent
from mlx_distill.recipe import Evaluate
from mlx_distill.teacher import LiveTeacher


class TestSet(NamedTuple):
    """`data.test`, ready to use."""

    __test__ = False  # for pytest: no test of ours

    rows: list[Row]
    encoded: list[Encoded]
    text_bytes: int  # UTF-8 bytes of the counted text


class Judged(NamedTuple):
    """What one model wrote for one test row."""

    text: str
    score: float | None  # pass (0 or 1), or ROUGE-L; None where the row has no scorer
    why: str | None  # it failed


def measure(
    name: str,
    loaded: Loaded,
    test: TestSet,
    options: Evaluate,
    vocabulary: int,
    *,
    teacher: LiveTeacher | None,
    folder: Path | None,
    timed: bool = True,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[Judged]]:
    """Measure one model, the same way whichever it is.

    Args:
        name: as in `evaluation.json`, for progress titles.
        teacher: to compare with; the teacher itself is compared with nothing.
        folder: where the model stands on disk; None where it stands nowhere (a student before
            training), which leaves its size out.
        timed: False for a model of the student's shape, whose speed would be measured twice.

    Returns:
        METRICS of `evaluation.json`, and what the model wrote, a row of the test set each.
    """
    metrics: dict[str, Any] = {}
    judged = [Judged("", None, None) for _ in test.rows]
    if "fidelity" in options.tasks:
        metrics |= fidelity(
            loaded.model,
            test.encoded,
            vocabulary,
            teacher=teacher,
            text_bytes=test.text_bytes,
            title=f"{name}: fidelity",
            progress=progress,
        )
    if {"code", "summary"} & set(options.tasks):
        scores, judged = judge(name, loaded, test.rows, options, progress)
        metrics |= scores
    metrics["parameters"] = parameter_count(loaded.model)
    if folder is not None:
        metrics["size_mib"] = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20
    if "speed" in options.tasks:
        metrics |= _speed(folder if timed else None, test)
    return metrics, judged


def judge(
    name: str, loaded: Loaded, rows: Sequence[Row], options: Evaluate, progress: Progress = silent
) -> tuple[dict[str, Any], list[Judged]]:
    """Let a model answer every row that a task of the recipe can score, and score the answers."""
    wanted = [i for i, row in enumerate(rows) if row.task in options.tasks]
    tokenizer = loaded.tokenizer
    answers = generate(
        loaded.model,
        [encode_prompt(rows[i], tokenizer) for i in wanted],
        end_of_turn_ids(tokenizer),
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        title=f"{name}: answers",
        progress=progress,
    )
    texts = [decode_answer(answer.tokens, tokenizer) for answer in answers]
    judged = [Judged("", None, None) for _ in rows]
    metrics: dict[str, Any] = {}
    for task in ("code", "summary"):
        places = [place for place, i in enumerate(wanted) if rows[i].task == task]
        if not places:
            continue
        of_task, said = [rows[wanted[place]] for place in places], [texts[place] for place in places]
        if task == "code":
            found, verdicts = pass_at_1(of_task, said, seconds=options.seconds, progress=progress)
        else:
            found, values = rouge(of_task, said)
            verdicts = [(value, None) for value in values]
        metrics |= found
        for place, (score, why) in zip(places, verdicts, strict=True):
            if not answers[place].finished and why is None and score < 1:
                why = f"not finished within {options.max_tokens} tokens"
            judged[wanted[place]] = Judged(texts[place], score, why)
    return metrics, judged


def _speed(folder: Path | None, test: TestSet) -> dict[str, Any]:
    """Speed and memory, in a fresh process."""
    names = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_ms",
        "peak_memory_gib",
    )
    if folder is None:
        why = "it has the shape, and so the speed, of the student"
        return dict.fromkeys(names) | {f"{name}_why": why for name in names}
    return fresh_look(folder, test.encoded[0].tokens, speed=True).speed
