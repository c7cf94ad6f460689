"""The stages that prove what was kept: every model measured alike, every artefact reloaded."""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode
from mlx_distill.errors import Fault
from mlx_distill.evaluate.exits import early_answers, exits_of
from mlx_distill.evaluate.fresh import check_equal, fresh_look
from mlx_distill.evaluate.model import SCORERS, Judged, TestSet, measure
from mlx_distill.files import write_json
from mlx_distill.metrics import CUT_FROM
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate
from mlx_distill.work import PRUNED, Work


def evaluate_models(work: Work) -> dict[str, Any]:
    """Measure every model of the run on `data.test`, and write `evaluation.json`."""
    if not work.recipe.evaluate.tasks:
        return {}
    prepared, options, cut = work.prepared, work.recipe.evaluate, work.recipe.student.prune
    test = _test_set(prepared.test_rows, prepared.test, prepared.tokenizer)
    live = work.comparable_teacher()
    stages = work.run.stages()
    metrics: dict[str, Any] = {}
    answers: dict[str, list[list[Judged]]] = {}

    def add(
        name: str,
        loaded: Loaded,
        folder: Path | None,
        read: TestSet = test,
        vocabulary: int = prepared.vocabulary,
        how: Evaluate = options,
    ) -> None:
        metrics[name], answers[name] = measure(
            name,
            loaded,
            read,
            how,
            vocabulary,
            teacher=None if name == "teacher" else live,
            folder=folder,
            valid=prepared.valid_rows,
            seed=work.recipe.seed,
            reasoning=work.recipe.data.reasoning,
            timed=name != "baseline",
            sparse=cut is not None and cut.sparsity is not None,
            unlike=_unlike(work) if name == "teacher" else None,
            progress=work.run.progress,
        )
        source = {"student": "train"}.get(name, name)
        for key in ("train_tokens", "train_seconds"):
            if key in stages.get(source, {}):  # both were healed alike between rounds of pruning
                metrics[name][key] = stages[source][key] + stages.get("prune", {}).get(key, 0)

    first = prepared.teachers.get("teacher")
    if first is not None:
        theirs = test
        if first.foreign:
            count = work.recipe.data.count
            encoded = [encode(row, first.tokenizer, count=count) for row in prepared.test_rows]
            theirs = _test_set(prepared.test_rows, encoded, first.tokenizer)
        add("teacher", work.teacher(), first.folder, theirs, first.vocabulary)
    before = models.fused(work.new_student())
    cut_out = None if cut is None else work.run.model(PRUNED)
    if work.recipe.teacher is not None and work.recipe.teacher.model == "student":
        # It is the teacher, and would answer the same again.
        silent = [task for task in options.tasks if task not in SCORERS]
        add("student_before", before, cut_out, how=options.model_copy(update={"tasks": silent}))
        metrics["student_before"] = metrics["teacher"] | metrics["student_before"]
        answers["student_before"] = answers["teacher"]
    else:
        add("student_before", before, cut_out)
    if cut is not None:
        metrics["student_before"][CUT_FROM] = stages["prune"]["of"]
    saved = ["baseline", "student", *stages["quantize"].get("models", [])]
    for name in saved:
        folder = work.run.model(name)
        if name == "baseline" and "why" in stages["baseline"]:
            continue
        add(name, models.load(str(folder), name), folder)
    for layer in exits_of(work.recipe):
        folder = work.run.model(f"student-exit{layer}")
        add(folder.name, models.load(str(folder), folder.name), folder)
    if exits_of(work.recipe):
        metrics["student"] |= early_answers(
            models.load(str(work.run.model("student")), "student"),
            test.rows,
            exits_of(work.recipe),
            max_tokens=options.max_tokens,
            progress=work.run.progress,
        )
    if first is not None and first.foreign:
        for name in set(metrics) - {"teacher"}:
            metrics[name] |= {"kl": None, "kl_why": "the teacher's tokens are others than the student's"}
    write_json(
        work.run.folder / "evaluation.json", {"schema": 1, "recipe": work.recipe.name, "models": metrics}
    )
    work.run.write_rows("evaluation", _side_by_side(test, answers))
    return {"models": list(metrics)}


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


def _side_by_side(test: TestSet, answers: dict[str, list[list[Judged]]]) -> list[dict[str, Any]]:
    """What each model wrote for each test row that was scored: its first answer, and how all scored."""
    rows = []
    for i, row in enumerate(test.rows):
        said = {name: judged[i] for name, judged in answers.items() if judged[i]}
        if said:
            rows.append(
                {
                    "task": row.task,
                    "prompt": row.question(),
                    "reference": row.answer() or (row.references or ("",))[0],
                    "answers": {
                        name: {**judged[0]._asdict(), "scores": [one.score for one in judged]}
                        for name, judged in said.items()
                    },
                }
            )
    return rows


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
