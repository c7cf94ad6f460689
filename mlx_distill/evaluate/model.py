"""Everything that a recipe asks to know about one model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

from mlx.utils import tree_flatten

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.code import pass_at_1
from mlx_distill.evaluate.decoding import MOST, mean_stderr, pass_at
from mlx_distill.evaluate.exact import exact_match
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.fresh import fresh_look
from mlx_distill.evaluate.summary import rouge
from mlx_distill.generate import generate
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.options import Evaluate, Reasoning
from mlx_distill.progress import Progress, silent
from mlx_distill.prune.sparse import sparsity_of
from mlx_distill.quantize.rounding import bits_per_weight
from mlx_distill.reasoning import split
from mlx_distill.teacher import LiveTeacher


class TestSet(NamedTuple):
    """`data.test`, ready to use."""

    __test__ = False  # for pytest: no test of ours

    rows: list[Row]
    encoded: list[Encoded]
    text_bytes: int  # UTF-8 bytes of the counted text


class Judged(NamedTuple):
    """One answer of one model to one test row."""

    text: str
    score: float  # pass or exact match (0 or 1), or ROUGE-L
    why: str | None  # it failed


Verdicts = tuple[dict[str, Any], list[tuple[float, str | None]]]  # means, and score and reason of each answer


class Scorer(NamedTuple):
    """How the answers to the rows of one task are scored."""

    metric: str  # the one whose standard error is given, and by which a temperature is chosen
    number: str  # name of the number of rows
    score: Callable[[Sequence[Row], Sequence[str], Evaluate, Progress], Verdicts]


def _code(rows: Sequence[Row], answers: Sequence[str], options: Evaluate, progress: Progress) -> Verdicts:
    return pass_at_1(rows, answers, seconds=options.seconds, progress=progress)


def _summary(rows: Sequence[Row], answers: Sequence[str], options: Evaluate, progress: Progress) -> Verdicts:
    means, values = rouge(rows, answers)
    return means, [(value, None) for value in values]


def _exact(rows: Sequence[Row], answers: Sequence[str], options: Evaluate, progress: Progress) -> Verdicts:
    share, values = exact_match(rows, answers)
    return {**share}, [(value, None) for value in values]


SCORERS = {  # by task of `evaluate.tasks` and of a row
    "code": Scorer("pass@1", "problems", _code),
    "summary": Scorer("rougeL", "summaries", _summary),
    "exact": Scorer("exact_match", "questions", _exact),
}


def measure(
    name: str,
    loaded: Loaded,
    test: TestSet,
    options: Evaluate,
    vocabulary: int,
    *,
    teacher: LiveTeacher | None,
    folder: Path | None,
    valid: Sequence[Row] = (),
    seed: int = 0,
    reasoning: Reasoning | None = None,
    timed: bool = True,
    sparse: bool = False,
    unlike: str | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[list[Judged]]]:
    """Measure one model, the same way whichever it is.

    Args:
        name: as in `evaluation.json`, for progress titles.
        teacher: to compare with; the teacher itself is compared with nothing.
        folder: where the model stands on disk; None where it stands nowhere (a student before
            training), which leaves its size out.
        valid: rows on which the temperature is chosen, for `options.tune`.
        seed: of the answers that are drawn.
        reasoning: the marks around worked steps, which are no part of an answer.
        timed: False for a model of the student's shape, whose speed would be measured twice.
        sparse: whether the share of weights that are zero is counted too.
        unlike: why the weights in `folder` are not those that are measured: their size is then that of the
            arrays in memory, and their speed, for which a folder is opened, is not known.

    Returns:
        METRICS of `evaluation.json`, and what the model wrote: for each row of the test set one entry an
        answer, none where no task scores the row.
    """
    metrics: dict[str, Any] = {}
    judged: list[list[Judged]] = [[] for _ in test.rows]
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
    if SCORERS.keys() & set(options.tasks):
        drawn: dict[str, Any] = {"vocabulary": vocabulary, "seed": seed, "reasoning": reasoning}
        if options.tune:
            options, tried = tuned(name, loaded, valid, options, progress, **drawn)
            metrics |= {"tuned": {f"{t:g}": score for t, score in tried.items()}}
        if options.tune or options.temperature > 0:
            metrics |= {"temperature": options.temperature}
        scores, judged = judge(name, loaded, test.rows, options, progress, **drawn)
        metrics |= scores
    metrics["parameters"] = parameter_count(loaded.model)
    if "quantization" in loaded.config:
        metrics["bits_per_weight"] = bits_per_weight(loaded.model)
    if sparse:
        metrics["sparsity"] = sparsity_of(loaded.model)
    if unlike is not None:
        arrays: Any = tree_flatten(loaded.model.parameters())
        metrics["size_mib"] = sum(array.nbytes for _, array in arrays) / 2**20
    elif folder is not None:
        metrics["size_mib"] = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20
    if "speed" in options.tasks:
        metrics |= _speed(folder if timed and unlike is None else None, test, unlike)
    return metrics, judged


def tuned(
    name: str,
    loaded: Loaded,
    rows: Sequence[Row],
    options: Evaluate,
    progress: Progress = silent,
    *,
    vocabulary: int | None = None,
    seed: int = 0,
    reasoning: Reasoning | None = None,
) -> tuple[Evaluate, dict[float, float]]:
    """The options with the best temperature of `options.tune` for this model, and the mean score at each.

    Args:
        rows: to choose on, never those of the test. Of two temperatures with one score the lower is taken.
        vocabulary: tokens beyond it are never written.
    """
    tried = {}
    for temperature in sorted(set(options.tune)):
        at, title = options.model_copy(update={"temperature": temperature}), f"{name} at {temperature:g}"
        drawn: dict[str, Any] = {"vocabulary": vocabulary, "seed": seed, "reasoning": reasoning}
        _, judged = judge(title, loaded, rows, at, progress, **drawn)
        means = [mean([answer.score for answer in answers]) for answers in judged if answers]
        tried[temperature] = mean(means)
    best = max(tried, key=tried.__getitem__)  # the first of equals
    return options.model_copy(update={"temperature": best}), tried


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
) -> tuple[dict[str, Any], list[list[Judged]]]:
    """Let a model answer every row that a task of the recipe can score, and score the answers.

    Args:
        reasoning: only what stands behind these marks is scored.

    Returns:
        each score's mean over rows and answers, its standard error over rows, and pass@k; and what
        `measure` returns of the answers.
    """
    drawn = options.samples if options.temperature > 0 else 1  # greedy answers are all the same
    asked = [i for i, row in enumerate(rows) if row.task in options.tasks for _ in range(drawn)]
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
    for task, scorer in SCORERS.items():
        of_task = [(i, answer) for i, answer in zip(asked, answers, strict=True) if rows[i].task == task]
        if not of_task:
            continue
        texts = [decode_answer(answer.tokens, tokenizer) for _, answer in of_task]
        answered = texts if reasoning is None else [split(text, reasoning)[1] for text in texts]
        found, verdicts = scorer.score([rows[i] for i, _ in of_task], answered, options, progress)
        for (i, answer), text, (score, why) in zip(of_task, texts, verdicts, strict=True):
            if not answer.finished and why is None and score < 1:
                why = f"not finished within {options.max_tokens} tokens"
            judged[i].append(Judged(text, score, why))
        scored = dict.fromkeys(i for i, _ in of_task)
        scores = [[one.score for one in judged[i]] * (options.samples // drawn) for i in scored]
        metrics |= found | {f"{scorer.metric}_stderr": mean_stderr(scores), scorer.number: len(scores)}
        if scorer.metric == "pass@1":
            metrics |= {f"pass@{k}": pass_at(k, scores) for k in MOST if k <= options.samples}
    return metrics, judged


def _speed(folder: Path | None, test: TestSet, unlike: str | None = None) -> dict[str, Any]:
    """Speed and memory, in a fresh process; null without a folder, with the reason."""
    names = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_ms",
        "peak_memory_gib",
    )
    if folder is None:
        why = unlike or "it has the shape, and so the speed, of the student"
        return dict.fromkeys(names) | {f"{name}_why": why for name in names}
    return fresh_look(folder, test.encoded[0].tokens, speed=True).speed
