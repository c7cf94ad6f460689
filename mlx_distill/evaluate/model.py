"""Everything that a recipe asks to know about one model."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.evaluate.answering import SCORERS, Answered, Judged, judge, tuned
from mlx_distill.evaluate.choice import choose
from mlx_distill.evaluate.disagreement import disagreements
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.harness import harness
from mlx_distill.evaluate.parts import Parts
from mlx_distill.evaluate.published import Published
from mlx_distill.evaluate.speed import measure_speed, not_measured
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.models.divided import together_of
from mlx_distill.options import Evaluate, Reasoning
from mlx_distill.progress import Progress, silent
from mlx_distill.prune.sparse import sparsity_of
from mlx_distill.quantize.rounding import bits_per_weight
from mlx_distill.teacher import LiveTeacher


class TestSet(NamedTuple):
    """`data.test`, ready to use."""

    __test__ = False  # for pytest: no test of ours

    rows: list[Row]
    encoded: list[Encoded]
    text_bytes: int  # UTF-8 bytes of the counted text


class Measured(NamedTuple):
    """What is known of one model."""

    metrics: dict[str, Any]  # METRICS of evaluation.json
    answers: dict[str | None, list[list[Judged]]]  # to each row of a published set; None: of `data.test`
    scores: dict[str, np.ndarray]  # by metric: (N, 2) float64, sum and count of each row that it scores
    disagreements: list[dict[str, Any]]  # rows on which it differs most from the teacher


def measure(
    name: str,
    load: Callable[[], Loaded],
    test: TestSet,
    options: Evaluate,
    vocabulary: int,
    *,
    teacher: Callable[[], LiveTeacher | None],
    folder: Path | None,
    probe: list[int] | None = None,
    valid: Sequence[Row] = (),
    published: Sequence[Published] = (),
    seed: int = 0,
    reasoning: Reasoning | None = None,
    unsafe: bool = False,
    untimed: str | None = None,
    sparse: bool = False,
    unlike: str | None = None,
    dissent: bool = False,
    parts: Parts | None = None,
    progress: Progress = silent,
) -> Measured:
    """Measure one model, the same way whichever it is.

    Args:
        name: as in `evaluation.json`, for progress titles.
        load: gives the model; not called where all that it is needed for was measured before.
        teacher: gives what to compare with; the teacher itself is compared with nothing.
        folder: where the model stands on disk; None where it stands nowhere (a student before
            training), which leaves its size out.
        probe: token ids that prompts are made of to measure speed.
        valid: rows on which the temperature is chosen, for `options.tune`.
        published: sets of problems beside `data.test`; the tasks of `options` choose among them.
        seed: of the answers that are drawn.
        reasoning: the marks around worked steps, which are no part of an answer.
        unsafe: run programs even where no sandbox can hold them.
        untimed: why its speed is not measured.
        sparse: whether the share of weights that are zero is counted too.
        unlike: why the weights in `folder` are not those that are measured: their size is then that of the
            arrays in memory, and their speed, for which a folder is opened, is not known.
        dissent: whether to keep the rows on which it differs most from the teacher.
        parts: what of this was done before.
    """
    loaded, parts = cache(load), parts or Parts()
    metrics: dict[str, Any] = {}
    answers: dict[str | None, list[list[Judged]]] = {None: [[] for _ in test.rows]}
    scores: dict[str, np.ndarray] = {}
    differing: list[dict[str, Any]] = []

    def once(part: str, work: Callable[[], Any]) -> Any:
        return parts.once(f"{name}/{part}", work)

    def ask(title: str, rows: Sequence[Row], how: Evaluate) -> Answered:
        drawn: dict[str, Any] = {"vocabulary": vocabulary, "seed": seed}
        return judge(title, loaded(), rows, how, progress, reasoning=reasoning, unsafe=unsafe, **drawn)

    def compared() -> dict[str, Any]:
        places = [i for i, row in enumerate(test.encoded) if row.start < len(row.tokens)]  # with an answer
        asked, encoded = [test.rows[i] for i in places], [test.encoded[i] for i in places]
        means, rows = fidelity(
            loaded().model,
            encoded,
            vocabulary,
            teacher=teacher(),
            text_bytes=test.text_bytes,
            title=f"{name}: fidelity",
            progress=progress,
        )
        sums = {"nll": [[float(row.nll.sum(dtype=np.float64)), len(row.nll)] for row in rows]}
        if rows[0].kl is not None:
            kls = [row.kl for row in rows if row.kl is not None]
            sums["kl"] = [[float(kl.sum(dtype=np.float64)), len(kl)] for kl in kls]
        most = disagreements(name, asked, encoded, rows, loaded().tokenizer) if dissent else []
        return {"metrics": means, "scores": sums, "disagreements": most}

    def chosen() -> Answered:
        places = [i for i, row in enumerate(test.rows) if row.task == "choice"]
        rows = [test.rows[i] for i in places]
        found, verdicts = choose(loaded(), rows, vocabulary, title=f"{name}: choices", progress=progress)
        judged: list[list[Judged]] = [[] for _ in test.rows]
        for i, (score, why, text) in zip(places, verdicts, strict=True):
            judged[i].append(Judged(text, score, why))
        return found, judged

    def add(answered: Answered, rows: Sequence[Row], of: str | None = None) -> None:
        found, judged = answered
        before = f"{of}_" if of else ""
        metrics.update({before + metric: value for metric, value in found.items()})
        given = [[Judged(*one) for one in row] for row in judged]
        known = answers.get(of) or [[] for _ in rows]
        answers[of] = [one or other for one, other in zip(given, known, strict=True)]
        for task, metric in METRIC_OF.items():
            of_task = [row for row, asked in zip(given, rows, strict=True) if row and asked.task == task]
            if of_task:
                scores[before + metric] = np.array([[mean(one.score for one in row), 1.0] for row in of_task])

    if "fidelity" in options.tasks:
        found = once("fidelity", compared)
        metrics |= found["metrics"]
        scores |= {metric: np.array(sums) for metric, sums in found["scores"].items()}
        differing += found["disagreements"]
    sets = [one for one in published if one.name in options.tasks]
    if sets or SCORERS.keys() & set(options.tasks):
        if options.tune:
            temperature, tried = once("temperature", lambda: tuned(name, valid, options, ask))
            options = options.model_copy(update={"temperature": temperature})
            metrics["tuned"] = tried
        if options.tune or options.temperature > 0:
            metrics["temperature"] = options.temperature
    if SCORERS.keys() & set(options.tasks):
        add(once("answers", lambda: ask(name, test.rows, options)), test.rows)
    coding = options.model_copy(update={"tasks": ["code"]})
    for one in sets:
        add(once(one.name, lambda of=one: ask(f"{name}: {of.name}", of.rows, coding)), one.rows, one.name)
    if "choice" in options.tasks:
        add(once("choice", chosen), test.rows)
    if "harness" in options.tasks:
        metrics |= once("harness", lambda: harness(loaded(), options, seed=seed, progress=progress))
    metrics |= once("weights", lambda: _weights(loaded(), folder, sparse, unlike))
    if "speed" in options.tasks:
        if folder is None or untimed is not None or unlike is not None:
            metrics |= not_measured(unlike or untimed or ALIKE)
        else:
            metrics |= once("speed", lambda: measure_speed(folder, probe or [], options.prompt_lengths))
    return Measured(metrics, answers, scores, differing)


ALIKE = "it has the shape, and so the speed, of the student"  # it would be measured twice
METRIC_OF: Mapping[str, str] = {task: scorer.metric for task, scorer in SCORERS.items()} | {
    "choice": "accuracy"
}


def _weights(loaded: Loaded, folder: Path | None, sparse: bool, unlike: str | None) -> dict[str, Any]:
    """How many numbers the weights are, in how many bits, and what they take."""
    together = together_of(loaded.model)
    model = loaded.model if together is None else together.whole
    metrics: dict[str, Any] = {"parameters": parameter_count(model)}
    if "quantization" in loaded.config:
        metrics["bits_per_weight"] = bits_per_weight(model)
    if sparse:
        metrics["sparsity"] = sparsity_of(loaded.model)
    if unlike is not None:
        arrays: Any = tree_flatten(loaded.model.parameters())
        metrics["size_mib"] = sum(array.nbytes for _, array in arrays) / 2**20
    elif folder is not None:
        metrics["size_mib"] = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20
    return metrics
