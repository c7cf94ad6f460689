"""Answers that a model writes to rows, and how they are scored."""

from collections.abc import Callable, Sequence
from statistics import fmean as mean
from typing import Any, NamedTuple

from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.code import pass_at_1
from mlx_distill.evaluate.decoding import MOST, mean_stderr, pass_at
from mlx_distill.evaluate.exact import exact_match
from mlx_distill.evaluate.summary import rouge
from mlx_distill.generate import generate
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate, Reasoning
from mlx_distill.progress import Progress, silent
from mlx_distill.reasoning import split


class Judged(NamedTuple):
    """One answer of one model to one test row."""

    text: str
    score: float  # pass, exact match or right choice (0 or 1), or ROUGE-L
    why: str | None  # it failed


Verdicts = tuple[dict[str, Any], list[tuple[float, str | None]]]  # means, and score and reason of each answer
Answered = tuple[dict[str, Any], list[list[Judged]]]  # metrics, and the answers to each row


class Scorer(NamedTuple):
    """How the answers to the rows of one task are scored."""

    metric: str  # the one whose standard error is given, and by which a temperature is chosen
    number: str  # name of the number of rows
    version: int  # of prompt and scoring: numbers of different versions do not compare
    score: Callable[[Sequence[Row], Sequence[str], Evaluate, bool, Progress], Verdicts]


def _code(
    rows: Sequence[Row], answers: Sequence[str], options: Evaluate, unsafe: bool, progress: Progress
) -> Verdicts:
    return pass_at_1(rows, answers, seconds=options.seconds, unsafe=unsafe, progress=progress)


def _summary(rows: Sequence[Row], answers: Sequence[str], *_: Any) -> Verdicts:
    means, values = rouge(rows, answers)
    return means, [(value, None) for value in values]


def _exact(rows: Sequence[Row], answers: Sequence[str], *_: Any) -> Verdicts:
    share, values = exact_match(rows, answers)
    return {**share}, [(value, None) for value in values]


SCORERS = {  # by task of `evaluate.tasks` and of a row
    "code": Scorer("pass@1", "problems", 2, _code),
    "summary": Scorer("rougeL", "summaries", 1, _summary),
    "exact": Scorer("exact_match", "questions", 1, _exact),
}


def judge(
    name: str,
    loaded: Loaded,
    rows: Sequence[Row],
    options: Evaluate,
    progress: Progress = silent,
    *,
    vocabulary: int | None = None,
    seed: int = 0,
    reasoning: Reasoning | None = None,
    unsafe: bool = False,
) -> Answered:
    """Let a model answer every row that a task of the recipe can score, and score the answers.

    Args:
        vocabulary: tokens beyond it are never written.
        seed: of the answers that are drawn.
        reasoning: only what stands behind these marks is scored.
        unsafe: run programs even where no sandbox can hold them.

    Returns:
        each score's mean over rows and answers, its standard error over rows, and pass@k; `unfinished` and
        `empty`, shares of the answers; and for each row an entry an answer, none where no task scores it.
    """
    drawn = options.samples if options.temperature > 0 else 1  # greedy answers are all the same
    tasks = SCORERS.keys() & set(options.tasks)
    asked = [i for i, row in enumerate(rows) if row.task in tasks for _ in range(drawn)]
    tokenizer = loaded.tokenizer
    answers = generate(
        loaded.model,
        [encode_prompt(rows[i], tokenizer) for i in asked],
        end_of_turn_ids(tokenizer),
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        sampling=options,
        seed=seed,
        vocabulary=vocabulary,
        title=f"{name}: answers",
        progress=progress,
    )
    judged: list[list[Judged]] = [[] for _ in rows]
    metrics: dict[str, Any] = {}
    for task in [task for task in SCORERS if task in tasks]:
        scorer = SCORERS[task]
        of_task = [(i, answer) for i, answer in zip(asked, answers, strict=True) if rows[i].task == task]
        if not of_task:
            continue
        texts = [decode_answer(answer.tokens, tokenizer) for _, answer in of_task]
        answered = texts if reasoning is None else [split(text, reasoning)[1] for text in texts]
        found, verdicts = scorer.score([rows[i] for i, _ in of_task], answered, options, unsafe, progress)
        for (i, answer), text, (score, why) in zip(of_task, texts, verdicts, strict=True):
            if not answer.finished and why is None and score < 1:
                why = f"not finished within {options.max_tokens} tokens"
            judged[i].append(Judged(text, score, why))
        scored = dict.fromkeys(i for i, _ in of_task)
        scores = [[one.score for one in judged[i]] * (options.samples // drawn) for i in scored]
        metrics |= found | {scorer.number: len(scores)}
        if (stderr := mean_stderr(scores)) is not None:
            metrics[f"{scorer.metric}_stderr"] = stderr
        if scorer.metric == "pass@1":
            metrics |= {f"pass@{k}": pass_at(k, scores) for k in MOST if k <= options.samples}
    if answers:
        metrics["unfinished"] = mean(not answer.finished for answer in answers)
        written = [one.text for answers_of in judged for one in answers_of]
        metrics["empty"] = mean(not text.strip() for text in written)
    return metrics, judged


def tuned(
    name: str,
    rows: Sequence[Row],
    options: Evaluate,
    ask: Callable[[str, Sequence[Row], Evaluate], Answered],
) -> tuple[float, dict[str, float]]:
    """The best temperature of `options.tune` for a model, and the mean score at each.

    Args:
        rows: to choose on, never those of the test. Of two temperatures with one score the lower is taken.
        ask: `judge` for this model.
    """
    tried = {}
    for temperature in sorted(set(options.tune)):
        at = options.model_copy(update={"temperature": temperature})
        _, judged = ask(f"{name} at {temperature:g}", rows, at)
        tried[temperature] = mean(mean(one.score for one in answers) for answers in judged if answers)
    best = max(tried, key=tried.__getitem__)  # the first of equals
    return best, {f"{temperature:g}": score for temperature, score in tried.items()}
