"""The stages that prove what was kept: every model measured alike, every artefact reloaded."""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import models
from mlx_distill.data.template import decode_answer
from mlx_distill.errors import Fault
from mlx_distill.evaluate.fresh import check_equal, fresh_look
from mlx_distill.evaluate.model import Judged, TestSet, measure
from mlx_distill.files import write_json
from mlx_distill.models import Loaded
from mlx_distill.teacher import LiveTeacher
from mlx_distill.work import Work


def evaluate_models(work: Work) -> dict[str, Any]:
    """Measure every model of the run on `data.test`, and write `evaluation.json`."""
    if not work.recipe.evaluate.tasks:
        return {}
    prepared, options = work.prepared, work.recipe.evaluate
    counted = [row.tokens[row.start :] for row in prepared.test]
    decoded = [decode_answer(tokens, prepared.tokenizer) for tokens in counted]
    test = TestSet(prepared.test_rows, prepared.test, sum(len(text.encode()) for text in decoded))
    live = work.live_teacher()
    stages = work.run.stages()
    metrics: dict[str, Any] = {}
    answers: dict[str, list[Judged]] = {}

    def add(name: str, loaded: Loaded, folder: Path | None, teacher: LiveTeacher | None) -> None:
        metrics[name], answers[name] = measure(
            name,
            loaded,
            test,
            options,
            prepared.vocabulary,
            teacher=teacher,
            folder=folder,
            timed=name != "baseline",
            progress=work.run.progress,
        )
        for key in ("train_tokens", "train_seconds"):
            source = {"student": "train"}.get(name, name)
            if key in stages.get(source, {}):
                metrics[name][key] = stages[source][key]

    if live is not None:
        add("teacher", work.teacher(), prepared.teacher_folder, None)
    add("student_before", models.fused(work.new_student()), None, live)
    saved = ["baseline", "student"] + ([stages["quantize"]["model"]] if work.recipe.quantize else [])
    for name in saved:
        folder = work.run.model(name)
        if name == "baseline" and "why" in stages["baseline"]:
            continue
        add(name, models.load(str(folder), name), folder, live)
    write_json(
        work.run.folder / "evaluation.json", {"schema": 1, "recipe": work.recipe.name, "models": metrics}
    )
    work.run.write_rows("evaluation", _side_by_side(test, answers))
    return {"models": list(metrics)}


def _side_by_side(test: TestSet, answers: dict[str, list[Judged]]) -> list[dict[str, Any]]:
    """What each model wrote for each test row that was scored."""
    rows = []
    for i, row in enumerate(test.rows):
        said = {name: judged[i] for name, judged in answers.items() if judged[i].score is not None}
        if said:
            rows.append(
                {
                    "task": row.task,
                    "prompt": row.question(),
                    "reference": row.answer() or (row.references or ("",))[0],
                    "answers": {name: judged._asdict() for name, judged in said.items()},
                }
            )
    return rows


def export_student(work: Work) -> dict[str, Any]:
    """Compare what each saved model computed in memory with what a fresh process makes of its folder."""
    if "mlx" not in work.recipe.export.formats:
        return {}
    result: dict[str, Any] = {}
    quantize = work.recipe.quantize
    for name in ["student"] + ([f"student-{quantize.bits}bit"] if quantize else []):
        folder = work.run.model(name)
        expected = np.load(work.run.folder / "probes" / f"{name}.npy", allow_pickle=False)
        text = decode_answer(work.probe(), work.prepared.tokenizer)
        look = fresh_look(folder, work.probe(), text=text)
        if look.tokens != work.prepared.tokenizer.encode(text):
            raise Fault(f"{folder}: its tokenizer, reloaded in a fresh process, makes other tokens of a text")
        result[name] = {"largest_difference": check_equal(folder, expected, look.logits)}
        work.run.console.say(f"{folder}: opens in plain mlx_lm.load and computes the same logits")
    return result
