"""A whole run, tiny: every stage, what it leaves, what it says, and that it reads every option."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import workshop
from workshop import command, contents

from mlx_distill import pipeline, recipe
from mlx_distill.console import Console
from mlx_distill.options import Compress, Endpoint, Sampling, Section, Shape
from mlx_distill.recipe import Recipe

WHOLE = [
    "data={train: {source: pocket, rows: 12}, prompts: {source: good.jsonl, rows: 8}, "
    "valid: {source: pocket, rows: 4}, test: {source: pocket, task: both, rows: 6}, max_tokens: 200}",
    "generate={max_tokens: 30, batch_size: 4, temperature: 0.5}",
    "train={steps: 4, batch_tokens: 512, learning_rate: 1e-2, log_every: 2, eval_every: 2, save_every: 2}",
    "quantize={group_size: 32}",
    "evaluate={tasks: [fidelity, code, summary, speed], max_tokens: 4, batch_size: 4, temperature: 1.0}",
]
MODELS = ["teacher", "student_before", "baseline", "student", "student-4bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workshop whose teacher has learned the labels by heart, so that its answers end."""
    root = workshop.make(tmp_path_factory.mktemp("workshop"))
    learn = ["teacher=null", "objective={cross_entropy: }", "student={model: teacher}", "train.steps=80"]
    taught, _ = run(root, "name=taught", *learn, "train.batch_tokens=512", upto="train")
    shutil.rmtree(root / "teacher")
    shutil.copytree(taught / "models" / "student", root / "teacher")
    return root


class Lines:
    """A stream that keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def run(folder: Path, *overrides: str, read: set[str] | None = None, **how: Any) -> tuple[Path, str]:
    """The run folder of a run in `folder`, and what it said; the options that it reads are put in `read`."""
    lines, plain = Lines(), Section.__getattribute__

    def spy(self: Section, name: str) -> Any:
        if read is not None and name in type(self).__pydantic_fields__:
            read.add(f"{type(self).__name__}.{name}")
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(workshop.REPOSITORY))
        loaded = recipe.load("recipe.yaml", overrides)
        patch.setattr(Section, "__getattribute__", spy)  # now: the recipe's own checks do not count
        found = pipeline.run(loaded, Console(lines), **how)  # type: ignore[arg-type]
    return folder / found, lines.text


@pytest.fixture(scope="module")
def read_by_whole() -> set[str]:
    """The options that the run below reads."""
    return set()


@pytest.fixture(scope="module")
def finished(folder: Path, read_by_whole: set[str]) -> Path:
    """The folder of a run with everything in it."""
    return run(folder, "name=whole", *WHOLE, read=read_by_whole)[0]


def test_everything_is_there(finished: Path) -> None:
    tree = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert (tree["schema"], tree["recipe"], list(tree["models"])) == (1, "whole", MODELS)
    everyone = {"nll", "bits_per_byte", "pass@1", "pass@1_stderr", "problems", "rougeL", "parameters"}
    speed = {
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "time_to_first_token_ms",
        "peak_memory_gib",
    }
    for name, metrics in tree["models"].items():
        wanted = set(everyone | speed)
        if name != "teacher":
            wanted |= {"kl", "kl_p95", "top1_agreement"}
        if name != "student_before":
            wanted |= {"size_mib"}
        if name in ("baseline", "student"):
            wanted |= {"train_tokens", "train_seconds"}
        assert wanted <= metrics.keys(), name
        for metric in wanted:
            assert metrics[metric] is not None or metrics[f"{metric}_why"], (name, metric)
    models = tree["models"]
    assert (
        models["student"]["parameters"]
        == models["student-4bit"]["parameters"]
        < models["teacher"]["parameters"]
    )
    assert models["student-4bit"]["size_mib"] < models["student"]["size_mib"]
    assert models["student"]["kl"] < models["student_before"]["kl"]
    names = {path.name for path in finished.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "models",
        "report.html",
    } <= names
    assert list(json.loads((finished / "stages.json").read_text(encoding="utf-8"))) == list(pipeline.STAGES)


def test_metrics_name_step_and_stage(finished: Path) -> None:
    lines = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert losses == [("student", 2), ("student", 4), ("baseline", 2), ("baseline", 4)]
    student, baseline = lines[0], next(line for line in lines if line["stage"] == "baseline")
    assert student["loss"] == pytest.approx(student["forward_kl"] + 0.5 * student["cross_entropy"])
    assert "forward_kl" not in baseline
    valid = [line for line in lines if "valid_nll" in line]
    assert [(line["stage"], line["step"]) for line in valid] == [(stage, step) for stage, step in losses]
    assert all("valid_kl" in line for line in valid if line["stage"] == "student")


def test_samples_stand_side_by_side(finished: Path) -> None:
    rows = [
        json.loads(line)
        for line in (finished / "samples" / "evaluation.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert len(rows) == 6
    assert {row["task"] for row in rows} == {"code", "summary"}
    for row in rows:
        assert list(row["answers"]) == MODELS
        assert all({"text", "score", "why"} <= answer.keys() for answer in row["answers"].values())
    written = [
        json.loads(line)
        for line in (finished / "samples" / "generated.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert len(written) == 8
    assert all(row["kept"] or row["reason"] for row in written)
    assert any(row["kept"] and row["answer"].startswith(" return x +") for row in written)


@pytest.mark.parametrize("name", ["student", "student-4bit", "baseline"])
def test_models_load_with_plain_mlx_lm(finished: Path, name: str) -> None:
    import mlx_lm

    model, tokenizer, *_ = mlx_lm.load(str(finished / "models" / name))
    logits = model(mx.array([tokenizer.encode("def f(x):")]))
    assert logits.shape[-1] == len(tokenizer)
    assert bool(mx.isfinite(logits).all())


def test_a_finished_run_goes_on_to_nothing(folder: Path, finished: Path) -> None:
    before = contents(finished)
    _, said = run(folder, "name=whole", *WHOLE, resume=True)
    assert len(said.splitlines()) == 1  # the headline: no stage had to be done
    kept = {name: size for name, size in before.items() if name != "environment.json"}
    assert kept.items() <= contents(finished).items()


def test_a_forgotten_stage_is_done_again_and_gives_the_same(
    folder: Path, finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    runs = copy / "runs" / "whole"
    stages = json.loads((runs / "stages.json").read_text(encoding="utf-8"))
    for name in ("train", "quantize"):
        del stages[name]
    (runs / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    shutil.rmtree(runs / "checkpoints")
    shutil.rmtree(runs / "models" / "student")
    before = {
        name: json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))["models"][name]["nll"]
        for name in MODELS
    }
    run(copy, "name=whole", *WHOLE, resume=True)
    for name in ("student", "student-4bit"):
        weights = Path("models", name, "model.safetensors")
        assert (runs / weights).read_bytes() == (finished / weights).read_bytes()
    assert json.loads((runs / "stages.json").read_text(encoding="utf-8"))["evaluate"] == stages["evaluate"]
    assert (
        before["student"]
        == json.loads((runs / "evaluation.json").read_text(encoding="utf-8"))["models"]["student"]["nll"]
    )


FAST = ["evaluate.tasks=[fidelity]", "train.steps=2"]


def test_changed_evaluation_goes_on_with_the_same_student(folder: Path) -> None:
    name = "name=measured"
    runs, said = run(folder, name, *FAST)
    assert said.count("step     2/2") == 2
    models = json.loads((runs / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert list(models) == MODELS[:-1]
    _, said = run(folder, name, *FAST, "quantize.group_size=32", "evaluate.baseline=false", resume=True)
    assert "step     2/2" not in said
    again = json.loads((runs / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert list(again) == ["teacher", "student_before", "student", "student-4bit"]
    assert again["student"] == models["student"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["evaluate.baseline=false"], "`evaluate.baseline` is false"),
        (
            ["teacher=null", "objective={cross_entropy: }", "student={model: student}"],
            "no teacher: the student",
        ),
    ],
)
def test_why_there_is_no_baseline(folder: Path, overrides: list[str], why: str) -> None:
    runs, _ = run(folder, "name=alone", *FAST, *overrides, upto="baseline", overwrite=True)
    assert json.loads((runs / "stages.json").read_text(encoding="utf-8"))["baseline"]["why"].startswith(why)
    assert not (runs / "models" / "baseline").exists()


def test_a_full_drive_can_be_gone_on_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "weights.safetensors")

    monkeypatch.setattr(pipeline, "quantize_student", full)
    quantize = ["quantize", "recipe.yaml", "name=full", "train.steps=1", "quantize.group_size=32"]
    quantize += ["--confirm-run-unsafe-code"]  # without it the command might be refused
    ended = command(folder, capsys, *quantize)
    assert (ended.code, len(ended.err)) == (75, 2)
    assert ended.err[0] == f"go on with: mlx-distill {' '.join(quantize)}"
    assert ended.err[1] == "error: the drive is full (weights.safetensors); make room, then go on"
    monkeypatch.undo()
    assert command(folder, capsys, *quantize).code == 0
    assert (folder / "runs/full/models/student-4bit/model.safetensors").exists()


# Options that none of the runs below reads, and why not.
UNREAD = {
    "Prune.parameters": "a target in place of `ratio`: test_target",
    "Prune.gib": "as above",
    "Recipe.compress": "of `mlx-distill compress`: test_compress",
    **{f"Compress.{name}": "as above" for name in Compress.model_fields},
    "NewTokenizer.pieces": "a tokenizer of the student's own: test_preflight, test_spans",
    "NewTokenizer.byte_fallback": "as above",
    **dict.fromkeys(("Evaluate.files", "Evaluate.limit"), "published problems: test_evaluate_runs"),
    "Evaluate.harness": "tasks of an extra: test_harness",
    **{f"Endpoint.{name}": "a server answers: test_endpoint_runs" for name in Endpoint.model_fields},
}


def _below(section: type[Section]) -> list[type[Section]]:
    """The sections of a recipe; the options of `mlx-distill chat` are one too, of no recipe."""
    found = [found for one in section.__subclasses__() for found in (one, *_below(one))]
    return [one for one in found if one.__module__ != "mlx_distill.speech"]


def test_a_run_reads_every_option(folder: Path, finished: Path, read_by_whole: set[str]) -> None:
    """Rule 9 of the style: an option that nobody reads is an option that does nothing."""
    read = set(read_by_whole)
    others = {
        "lora": ["student={model: student, method: lora, rank: 4, dropout: 0.1}"],
        "cached": ["teacher={model: teacher, source: cache, sampled: 4}", "objective={forward_kl: }"],
        "own": ["generate={on_policy: {max_tokens: 4, buffer: 4}}", "objective={forward_kl: }"],
        "paced": [
            "data.reasoning={close: x, learn: two_tasks}",
            "train.curriculum={by: length}",
            "objective={cross_entropy: }",
        ],
        "pruned": [
            "student={prune: {ratio: 0.5, axes: [feed_forward, layers], layers_by: loss, rounds: 2, heal: 1, "
            "tokens: 300, sparsity: {share: 0.3}}}",
            "teacher={model: teacher, quantize: {bits: 8, group_size: 32}}",
            "quantize={bits: 4, group_size: 32, mixed: [2, 4, 8], rows: 4}",
        ],
        "aware": [
            "student={prune: {model: teacher, sizes: {num_hidden_layers: 1}, vocabulary: true}}",
            "quantize={method: qad, bits: 4, group_size: 32, steps: 2, rank: 2}",
        ],
    }
    for name, overrides in others.items():
        upto = "quantize" if name in ("pruned", "aware") else "train"
        run(folder, f"name={name}", *overrides, *FAST, upto=upto, read=read)
    sections = [Recipe, *(set(_below(Section)) - {Recipe, Shape, Sampling})]
    everything = {f"{section.__name__}.{name}" for section in sections for name in section.model_fields}
    assert sorted(everything - read) == sorted(UNREAD)
    # A shape is handed on whole: it becomes the model's config.
    shape = recipe.load(finished / "recipe.yaml").student.shape
    config = json.loads((finished / "models" / "student" / "config.json").read_text(encoding="utf-8"))
    assert shape is not None
    given = {name: value for name, value in shape.model_dump().items() if value is not None}
    assert given.items() <= config.items()
