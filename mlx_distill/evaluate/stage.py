"""The stages that prove what was kept: every model measured alike, every artefact reloaded."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.sources import digest
from mlx_distill.data.template import decode_answer, encode_test
from mlx_distill.errors import Fault
from mlx_distill.evaluate.answering import Judged
from mlx_distill.evaluate.exits import early_answers, exits_of
from mlx_distill.evaluate.fresh import check_equal, fresh_look
from mlx_distill.evaluate.model import ALIKE, Measured, TestSet, measure
from mlx_distill.evaluate.parts import Parts
from mlx_distill.evaluate.settings import settings
from mlx_distill.evaluate.statistics import comparisons
from mlx_distill.files import write_json
from mlx_distill.metrics import CUT_FROM
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate
from mlx_distill.work import PRUNED, Work


def evaluate_models(work: Work) -> dict[str, Any]:
    """Measure every model of the run alike, and write `evaluation.json`.

    Stopped in between, it goes on with the first part of the first model that is missing.
    """
    if not work.recipe.evaluate.tasks:
        return {}
    prepared, options, cut = work.prepared, work.recipe.evaluate, work.recipe.student.prune
    test = _test_set(prepared.test_rows, prepared.test, prepared.tokenizer)
    live = cache(work.comparable_teacher)
    stages = work.run.stages()
    parts = Parts(work.run.folder / "evaluation", _key(work))
    found: dict[str, Measured] = {}

    def add(
        name: str,
        load: Callable[[], Loaded],
        folder: Path | None,
        read: TestSet = test,
        vocabulary: int = prepared.vocabulary,
        how: Evaluate = options,
    ) -> None:
        found[name] = measure(
            name,
            load,
            read,
            how,
            vocabulary,
            teacher=(lambda: None) if name == "teacher" else live,
            folder=folder,
            probe=work.probe(),
            valid=prepared.valid_rows,
            published=prepared.published,
            seed=work.recipe.seed,
            reasoning=work.recipe.data.reasoning,
            unsafe=work.unsafe,
            untimed=_untimed(work, name),
            sparse=cut is not None and cut.sparsity is not None,
            unlike=_unlike(work) if name == "teacher" else None,
            dissent=name == "student" and prepared.teachers.get("teacher") is not None,
            parts=parts,
            progress=work.run.progress,
        )
        source = {"student": "train"}.get(name, name)
        for key in ("train_tokens", "train_seconds"):
            if key in stages.get(source, {}):  # both were healed alike between rounds of pruning
                found[name].metrics[key] = stages[source][key] + stages.get("prune", {}).get(key, 0)

    def saved(name: str) -> Callable[[], Loaded]:
        return lambda: models.load(str(work.run.model(name)), name)

    first = prepared.teachers.get("teacher")
    if first is not None:
        theirs = test
        if first.foreign:
            count = work.recipe.data.count
            encoded = [encode_test(row, first.tokenizer, count=count) for row in prepared.test_rows]
            theirs = _test_set(prepared.test_rows, encoded, first.tokenizer)
        add("teacher", work.teacher, first.folder, theirs, first.vocabulary)
    cut_out = None if cut is None else work.run.model(PRUNED)

    def before() -> Loaded:
        return models.fused(work.new_student())

    if work.recipe.teacher is not None and work.recipe.teacher.model == "student":
        # It is the teacher, and would answer the same again.
        silent = [task for task in options.tasks if task in ("fidelity", "speed")]
        add("student_before", before, cut_out, how=options.model_copy(update={"tasks": silent}))
        teacher, alone = found["teacher"], found["student_before"]
        found["student_before"] = Measured(
            teacher.metrics | alone.metrics, teacher.answers, teacher.scores | alone.scores, []
        )
    else:
        add("student_before", before, cut_out)
    if cut is not None:
        found["student_before"].metrics[CUT_FROM] = stages["prune"]["of"]
    for name in ["baseline", "student", *stages["quantize"].get("models", [])]:
        if name != "baseline" or "why" not in stages["baseline"]:
            add(name, saved(name), work.run.model(name))
    exits = exits_of(work.recipe)
    for layer in exits:
        add(f"student-exit{layer}", saved(f"student-exit{layer}"), work.run.model(f"student-exit{layer}"))
    if exits:
        most = {"max_tokens": options.max_tokens, "progress": work.run.progress}
        found["student"].metrics.update(
            parts.once("student/exits", lambda: early_answers(saved("student")(), test.rows, exits, **most))
        )
    if first is not None and first.foreign:
        for name in set(found) - {"teacher"}:
            found[name].metrics.update(kl=None, kl_why="the teacher's tokens are others than the student's")
    _write(work, test, found)
    parts.forget()
    return {"models": list(found)}


def _write(work: Work, test: TestSet, found: dict[str, Measured]) -> None:
    """`evaluation.json`, what every model answered, and where the student differs from its teacher."""
    teacher = work.prepared.teachers.get("teacher")
    scores = comparable(found, foreign=teacher is not None and teacher.foreign)
    evaluation = {
        "schema": 1,
        "recipe": work.recipe.name,
        "models": {name: one.metrics for name, one in found.items()},
        "comparisons": comparisons(scores, seed=work.recipe.seed),
        "tasks": settings(work),
    }
    sets = [(None, test.rows), *((one.name, one.rows) for one in work.prepared.published)]
    answers = {name: one.answers for name, one in found.items()}
    work.run.write_rows("evaluation", [row for of, rows in sets for row in _side_by_side(of, rows, answers)])
    work.run.write_rows("disagreements", [row for one in found.values() for row in one.disagreements])
    write_json(work.run.folder / "evaluation.json", evaluation)


def comparable(found: Mapping[str, Measured], *, foreign: bool) -> dict[str, dict[str, np.ndarray]]:
    """What models are compared by: all their scores, but nats of a teacher whose tokens are others."""
    return {
        name: {
            metric: sums
            for metric, sums in one.scores.items()
            if not (foreign and name == "teacher" and metric == "nll")
        }
        for name, one in found.items()
    }


def _key(work: Work) -> str:
    """Of all that the numbers depend on: what is asked, of which rows, and how the models came about."""
    prepared, stages = work.prepared, work.run.stages()
    made = {
        name: stages[name]
        for name in ("generate", "prune", "train", "baseline", "quantize")
        if name in stages
    }
    asked = work.recipe.evaluate.model_dump(mode="json"), work.recipe.seed
    rows = (
        digest(prepared.test_rows),
        digest(prepared.valid_rows),
        [one.version for one in prepared.published],
    )
    return hashlib.sha256(json.dumps([asked, rows, made]).encode()).hexdigest()


def _untimed(work: Work, name: str) -> str | None:
    """Why the speed of a model is not measured; None if it is."""
    if name == "teacher" and work.is_divided(name):
        return f"{work.ranks.size} processes hold it in parts"
    return ALIKE if name == "baseline" else None


def _unlike(work: Work) -> str | None:
    """Why the teacher that teaches is not the one on disk; None if it is."""
    kept, teacher = work.prepared.kept_tokens, work.recipe.teacher
    if teacher is None or teacher.model == "student":
        return None
    if teacher.quantize is not None:
        return "it was rounded as it was loaded, and on disk its weights are whole"
    return None if kept is None else f"it teaches with {len(kept)} of its tokens, and on disk it has them all"


def _test_set(rows: list[Row], encoded: list[Encoded], tokenizer: Any) -> TestSet:
    texts = (decode_answer(row.tokens[row.start :], tokenizer) for row in encoded)
    return TestSet(rows, encoded, sum(len(text.encode()) for text in texts))


def _side_by_side(
    of: str | None, asked: list[Row], answers: dict[str, dict[str | None, list[list[Judged]]]]
) -> list[dict[str, Any]]:
    """What each model wrote for each row that was scored: its first answer, and how all scored.

    Args:
        of: the published set that the rows are of; None: `data.test`.
        answers: of each model, by set.
    """
    rows = []
    for i, row in enumerate(asked):
        said = {name: given[of][i] for name, given in answers.items() if of in given and given[of][i]}
        if said:
            rows.append(
                {
                    "set": of,
                    "task": row.task,
                    "prompt": row.question(),
                    "reference": _reference(row),
                    "answers": {
                        name: {**judged[0]._asdict(), "scores": [one.score for one in judged]}
                        for name, judged in said.items()
                    },
                }
            )
    return rows


def _reference(row: Row) -> str:
    if row.right is not None:
        return row.choices[row.right]
    return row.answer() or (row.references or ("",))[0]


def export_student(work: Work) -> dict[str, Any]:
    """Compare what each saved model computed in memory with what a fresh process makes of its folder."""
    if "mlx" not in work.recipe.export.formats:
        return {}
    result: dict[str, Any] = {}
    cut_out = [] if work.recipe.student.prune is None else [PRUNED]
    names = [*cut_out, "student", *(f"student-exit{layer}" for layer in exits_of(work.recipe))]
    for name in [*names, *work.run.stages().get("quantize", {}).get("models", [])]:
        folder = work.run.model(name)
        expected = np.load(work.run.folder / "probes" / f"{name}.npy", allow_pickle=False)
        text = decode_answer(work.probe(), work.prepared.tokenizer)
        look = fresh_look(folder, work.probe(), text=text)
        if look.tokens != work.prepared.tokenizer.encode(text):
            raise Fault(f"{folder}: its tokenizer, reloaded in a fresh process, makes other tokens of a text")
        result[name] = {"largest_difference": check_equal(folder, expected, look.logits)}
        work.run.console.say(f"{folder}: opens in plain mlx_lm.load and computes the same logits")
    return result
