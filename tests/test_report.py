"""The report shows what the run folder holds: no number changed, no text of a model let loose."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from measured import MODELS

from mlx_distill.errors import DataError, NotFound, RunFolderError
from mlx_distill.metrics import COST, QUALITY, count, ordered
from mlx_distill.report import write_comparison, write_report

HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>"
RECIPE = """name: quickstart
seed: 0
student: {shape: {hidden_size: 64, num_hidden_layers: 4}}
teacher: {model: embedded}
data: {train: {source: pocket, rows: 100}, prompts: {source: pocket, rows: 5000, start: 100}}
objective: {forward_kl: {weight: 1.0}, cross_entropy: {weight: 0.5}}
train: {steps: 600, learning_rate: 3e-3}
"""


COMPARISONS = [
    {"metric": "pass@1", "model": "student", "other": "teacher", "problems": 1000, "difference": -0.077,
     "low": -0.096, "high": -0.059, "level": 0.95, "verdict": "worse"},
    {"metric": "pass@1", "model": "student", "other": "baseline", "problems": 1000, "difference": 0.638,
     "low": 0.607, "high": 0.668, "level": 0.95, "verdict": "better"},
    {"metric": "pass@1", "model": "student-4bit", "other": "student", "problems": 1000, "difference": -0.021,
     "low": -0.043, "high": 0.001, "level": 0.95, "verdict": "no difference seen"},
    {"metric": "kl", "model": "student", "other": "baseline", "problems": 1000, "difference": -0.8307,
     "low": -0.86, "high": -0.8, "level": 0.95, "verdict": "better"},
]  # fmt: skip
TASKS = {
    "code": {"version": "2", "rows": 1000, "digest": "ab" * 32, "max_tokens": 100, "temperature": 0.0,
             "samples": 1, "seed": 0, "batch_size": 256, "seconds": 5.0, "prompt": f"{{prompt}}{HOSTILE}"},
}  # fmt: skip
STAGES = {
    "generate": {"written": 5000, "kept": 4930, "dropped": {"unfinished": 41, "empty": 29}},
    "cache": {},  # it had nothing to do
    "train": {"rows": 5030, "train_tokens": 1340416, "train_seconds": 118.2},
    "baseline": {"rows": 100, "train_tokens": 1331200, "train_seconds": 91.4},
}
MEMORY = {
    "predicted_gib": {"student": 0.02, "teachers": 0.01, "logits": 0.034, "together": 0.064},
    "measured_gib": {"generate": 0.31, "cache": 0.5, "train": 0.08},
    "machine_gib": 17.6,
    "how": "resident memory of the process",
    "why": None,
}
DISAGREEMENTS = [
    {"model": "student", "prompt": f"def f(x):\n{HOSTILE}", "kl": 0.4,
     "tokens": [["    ", 0.01, "    ", "    "], ["return", 0.3, "return", "return"],
                [" x\n", 1.4, " y\n", " x\n"], [HOSTILE, 2.5, HOSTILE, "<b>"], ["", 0.0, "", ""]]},
    {"model": "student", "prompt": "q", "kl": 0.9, "tokens": [["late", 0.9, "soon", "late"]]},
]  # fmt: skip


def make_run(
    folder: Path, name: str = "quickstart", models: dict[str, Any] | None = None, minimal: bool = False
) -> Path:
    """A run folder as a finished quickstart leaves it; with `minimal`, evaluation.json alone."""
    folder.mkdir(parents=True)
    evaluation = {"schema": 1, "recipe": name, "models": MODELS if models is None else models}
    evaluation |= {} if minimal else {"comparisons": COMPARISONS, "tasks": TASKS}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    if minimal:
        return folder
    (folder / "recipe.yaml").write_text(RECIPE.replace("quickstart", name), encoding="utf-8")
    environment = {"mlx_distill": "0.1.0", "mlx": "0.32.4", "mlx_lm": "0.32.2", "python": "3.11.2",
                   "platform": "Linux-6.1-x86_64", "machine": "x86_64", "device": "cpu", "memory_gib": 7.8,
                   "commit": "1f3c9ab", "blas": "OpenBLAS 0.3.21", "started": "2026-11-21T02:00:00+0000",
                   "command": "mlx-distill run recipes/quickstart.yaml"}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    lines = []
    for stage, floor in (("student", 0.15), ("baseline", 0.02)):
        for step in range(20, 601, 20):
            loss = floor + 6 * 0.985**step + 0.03 * ((step * 7919) % 13) / 13
            lines.append({"step": step, "stage": stage, "loss": loss, "learning_rate": 1e-3})
            if step % 100 == 0:
                kl = (0.12 if stage == "student" else 0.95 - 40 / step) + 6 * 0.985**step
                lines.append({"step": step, "stage": stage, "valid_nll": kl + 0.07, "valid_kl": kl})
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "samples").mkdir()
    outcomes = ["student"] * 7 + ["all"] * 11 + ["teacher"] * 2
    rows = [_answered(number, outcome) for number, outcome in enumerate(outcomes)]
    (folder / "samples" / "evaluation.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    reasons = [None] * 4930 + ["unfinished after 64 tokens"] * 41 + [f"empty {HOSTILE}"] * 29
    generated = [
        {"prompt": "p", "row": row, "answer": "a", "kept": reason is None, "reason": reason}
        for row, reason in enumerate(reasons)
    ]
    (folder / "samples" / "generated.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in generated), encoding="utf-8"
    )
    (folder / "samples" / "disagreements.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in DISAGREEMENTS), encoding="utf-8"
    )
    (folder / "stages.json").write_text(json.dumps(STAGES), encoding="utf-8")
    (folder / "memory.json").write_text(json.dumps(MEMORY), encoding="utf-8")
    return folder


def _answered(number: int, outcome: str) -> dict[str, Any]:
    right = f"    values = [x * {number + 2} for x in values]\n    return sum(values)"
    wrong = f"    values = [x + {number + 2} for x in values]\n    return sum(values)"
    students = ("teacher", "student", "student-4bit")
    by_outcome = {"student": students, "all": tuple(MODELS), "teacher": ("teacher",)}
    answers = {}
    for model in MODELS:
        good = model in by_outcome[outcome]
        text = right if good else HOSTILE if model == "student_before" else wrong
        why = None if good else "SyntaxError" if text is HOSTILE else "f([1, 2]) gave 7, not 12"
        answers[model] = {"text": text, "score": float(good), "why": why}
    prompt = f'def f(values):\n    """Multiply each value by {number + 2}, then return their sum."""\n'
    return {"task": "code", "prompt": prompt, "reference": right, "answers": answers}


class Page(HTMLParser):
    """Tags with their attributes, the table cells, and all text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("matplotlib")
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "quickstart")).read_text(encoding="utf-8")


def test_every_number_of_the_evaluation_stands_in_the_tables_exactly(html: str):
    tags = [tag for name, tag in Page(html).tags if name == "data" and "data-metric" in tag]
    shown = sorted(float(tag["value"] or "nan") for tag in tags)
    columns = {metric.name for metric in (*QUALITY, *COST)}
    given = [v for metrics in MODELS.values() for k, v in metrics.items() if k in columns and v is not None]
    assert shown == sorted(given)


def test_nothing_is_loaded_from_outside_and_nothing_runs(html: str):
    page = Page(html)
    loading = {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not loading & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all((attributes.get(key) or "#").startswith("#") for key in ("src", "href", "xlink:href"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\((?!#)|@import", style)
    assert "default-src 'none'" in html


def test_what_a_model_wrote_is_text(html: str):
    assert "<script" not in html
    assert HOSTILE in Page(html).text


def test_the_usual_mistake_of_unescaped_text_would_be_seen():
    assert "script" in {tag for tag, _ in Page(f"<pre>{HOSTILE}</pre>").tags}


def test_ids_are_unique_and_references_reach_one(html: str):
    tags = Page(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {attributes["href"] for _, attributes in tags if "href" in attributes}
    assert references <= {f"#{name}" for name in ids}


def test_figures_take_the_colours_of_the_page(html: str):
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert svg.count("<svg") == 5  # three curves, size and latency
    assert "var(--c1)" in svg
    assert not re.findall(r"#0[0-9a-f]{5}|#fff", svg)


def test_what_is_missing_says_why(html: str):
    assert "energy is measured on macOS only" in html


def test_samples_show_each_outcome_with_how_often_it_was(html: str):
    for rows in (7, 11, 2):
        assert f"{rows} of 20 rows had this outcome" in html
    assert html.index("7 of 20") < html.index("11 of 20")  # the models differ there


def test_generated_rows_are_accounted_for(html: str):
    text = " ".join(Page(html).text.split())
    assert "5,000prompts 5,000answers written 4,930kept70 dropped (1.4 %)" in text
    assert "5,030rows to learn from100 labelled, 4,930 answers" in text
    assert "unfinished after 64 tokens41" in text


def test_evaluation_alone_is_enough(tmp_path: Path):
    html = write_report(make_run(tmp_path / "run", minimal=True)).read_text(encoding="utf-8")
    assert "92\u00a0%" in html
    assert "<h2>Samples" not in html


def test_a_model_with_nothing_measured_is_enough(tmp_path: Path):
    html = write_report(make_run(tmp_path / "run", models={"student": {}}, minimal=True)).read_text(
        encoding="utf-8"
    )
    assert "No score of the student was measured" in html


def test_without_matplotlib_the_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "pip install &#39;mlx-distill[report]&#39;" in html
    assert "<svg" not in html
    assert "88.1" in html


def test_half_a_line_half_a_surrogate_and_odd_values_cost_no_report(tmp_path: Path):
    models = {"student": {"pass@1": float("nan"), "kl": "a lot", "energy_price": 3.5}}
    folder = make_run(tmp_path / "run", models=models)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 620, "sta')
    answers = {"student": {"text": "\x00", "score": None}}
    row = {"task": "code", "prompt": "\ud800", "reference": None, "answers": answers}
    (folder / "samples" / "evaluation.jsonl").write_text(json.dumps(row) + "\n[1]\n", encoding="utf-8")
    (folder / "environment.json").write_text("[]", encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    assert "metrics.jsonl: 1 line could not be read" in html
    assert "a lot" in html
    assert "energy price" in html


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 2, "models": {"student": {}}}', '{"schema": 1, "models": {}}']
)
def test_an_unreadable_evaluation_is_one_line_and_leaves_nothing(tmp_path: Path, text: str):
    (tmp_path / "evaluation.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="mlx-distill evaluate RECIPE") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_folder_without_evaluation_says_what_to_run(tmp_path: Path):
    with pytest.raises(NotFound, match=r"evaluation.json: no such file; .*mlx-distill evaluate RECIPE"):
        write_report(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run", minimal=True)
    with pytest.raises(RunFolderError, match="nowhere"):
        write_comparison([run], tmp_path / "nowhere" / "report.html")


def test_several_runs_stand_side_by_side(tmp_path: Path):
    pytest.importorskip("matplotlib")
    better = {**MODELS, "student": {**MODELS["student"], "pass@1": 0.9012}}
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", name="more-steps", models=better)
    (two / "recipe.yaml").write_text(
        (two / "recipe.yaml").read_text(encoding="utf-8").replace("steps: 600", "steps: 900"),
        encoding="utf-8",
    )
    html = write_comparison([one, two], tmp_path / "both.html").read_text(encoding="utf-8")
    page = Page(html)
    exact = [tag["value"] for name, tag in page.tags if name == "data"]
    assert "0.881" in exact and "0.9012" in exact
    assert "train.steps" in page.text and "900" in page.text
    assert "train.learning_rate" not in page.text[: page.text.index("How it was made")]
    assert html.count("<svg") == 5


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    runs = [make_run(tmp_path / name, minimal=True) for name in ("first", "second")]
    html = write_comparison(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert str(runs[0]) in html and str(runs[1]) in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (12345, "12.3 k"),
        (999_999, "1.00 M"),
        (1029312, "1.03 M"),
        (7.6e9, "7.60 B"),
    ],
)
def test_counts_are_short(value: float, text: str):
    assert count(value) == text


PRUNED = {
    **MODELS,
    "student_before": {
        **MODELS["student_before"],
        "pass@1": 0.031,
        "kl": 2.5,
        "weights_before_pruning": 393216,
    },
}


def test_the_controls_of_a_pruned_student_have_their_own_names(tmp_path: Path):
    html = write_report(make_run(tmp_path / "cut", models=PRUNED)).read_text(encoding="utf-8")
    for name in ("pruned, before healing", "baseline: pruned and trained on labels alone"):
        assert html.count(name) > 2, "in the table and in the samples"
    assert "student before training" not in html and "baseline, no teacher" not in html
    plain = make_run(tmp_path / "plain", name="plain")
    both = Page(
        write_comparison([tmp_path / "cut", plain], tmp_path / "both.html").read_text(encoding="utf-8")
    ).text
    assert "student before training" in both and "pruned, before healing" not in both


SMALLER = {
    f"student-{name}": {**MODELS["student-4bit"], "size_mib": size, "pass@1": score}
    for name, size, score in (("3bit", 0.19, 0.61), ("mxfp4", 0.22, 0.84), ("8bit", 0.4, 0.879))
}


def test_several_quantized_models_stand_from_the_largest_to_the_smallest(tmp_path: Path):
    models = {**SMALLER, **MODELS}
    assert ordered(models)[4:] == ["student-8bit", "student-4bit", "student-mxfp4", "student-3bit"]
    html = write_report(make_run(tmp_path / "run", models=models)).read_text(encoding="utf-8")
    places = [html.index(f"</i>{name}</th>") for name in ordered(models)[4:]]
    assert places == sorted(places)
