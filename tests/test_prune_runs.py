"""Runs whose student is cut out of a bigger model, through the command line."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from workshop import command, contents, make

from mlx_distill import models

FAST = ["train.steps=2", "evaluate.tasks=[fidelity]", "evaluate.baseline=false", "train.compile=false"]
HALF = "student={prune: {sizes: {hidden_size: 32, intermediate_size: 64}, tokens: 200}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("workshop"))


def run(folder: Path, capsys: pytest.CaptureFixture[str], name: str, *overrides: str) -> Path:
    ended = command(folder, capsys, "run", "recipe.yaml", f"name={name}", *FAST, *overrides)
    assert ended.code == 0, ended.err
    return folder / "runs" / name


def weights(folder: Path) -> dict[str, np.ndarray]:
    parameters = tree_flatten(models.load(str(folder), "x").model.parameters())
    return {name: np.array(array) for name, array in parameters}  # pyright: ignore[reportGeneralTypeIssues]


def test_a_pruned_student_is_healed_measured_and_exported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(folder, capsys, "half", HALF)
    config = json.loads((out / "models" / "pruned" / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_size"], config["intermediate_size"]) == (32, 64)
    assert config["model_type"] == "llama"
    metrics = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["models"]
    before = metrics["student_before"]
    assert before["parameters"] == metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert before["size_mib"] == pytest.approx(metrics["student"]["size_mib"], rel=0.01)
    stages = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    assert stages["prune"]["parameters"] == before["parameters"]
    assert stages["prune"]["of"] == metrics["teacher"]["parameters"]
    assert set(stages["export"]) == {"pruned", "student"}, "each artefact is reloaded"
    kept = json.loads((out / "pruning" / "round-1.json").read_text(encoding="utf-8"))
    assert len(kept["kept"]["hidden"]) == kept["sizes"]["hidden"] == 32
    pruned, student = weights(out / "models" / "pruned"), weights(out / "models" / "student")
    assert any((pruned[name] != student[name]).any() for name in pruned), "it learned"


def test_what_stays_are_the_teachers_own_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(folder, capsys, "layers", "student={prune: {sizes: {num_hidden_layers: 1}}}")
    teacher, pruned = weights(folder / "teacher"), weights(out / "models" / "pruned")
    [layer] = json.loads((out / "pruning" / "round-1.json").read_text(encoding="utf-8"))["kept"]["layers"]
    for name, array in pruned.items():
        assert (array == teacher[name.replace("layers.0.", f"layers.{layer}.")]).all(), name


def test_rounds_approach_the_target_and_heal_between(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = "student={prune: {sizes: {intermediate_size: 32}, rounds: 2, heal: 3, tokens: 200}}"
    out = run(folder, capsys, "rounds", prune)
    stages = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    first = json.loads((out / "models" / "round-1" / "config.json").read_text(encoding="utf-8"))
    last = json.loads((out / "models" / "pruned" / "config.json").read_text(encoding="utf-8"))
    assert 96 > first["intermediate_size"] > last["intermediate_size"] == 32
    assert stages["prune"]["train_tokens"] == stages["round-1"]["train_tokens"] > 0
    metrics = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["models"]
    healed = stages["round-1"]["train_tokens"] + stages["train"]["train_tokens"]
    assert metrics["student"]["train_tokens"] == healed, "all tokens that it learned from are counted"


def test_rounds_stopped_between_go_on_to_the_same_bits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_distill.prune import stage

    prune = "student={prune: {sizes: {intermediate_size: 32}, rounds: 2, heal: 3, tokens: 200}}"
    arguments = ["recipe.yaml", *FAST, prune]
    whole = run(folder, capsys, "whole", prune)
    cut, calls = stage.cut, list[int]()

    def stopped(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cut(*arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(stage, "cut", stopped)
        assert command(folder, capsys, "run", *arguments, "name=parts").code != 0
    parts = folder / "runs" / "parts"
    assert not (parts / "models" / "pruned").exists()
    assert command(folder, capsys, "run", *arguments, "name=parts", "--resume").code == 0
    ours, theirs = weights(parts / "models" / "student"), weights(whole / "models" / "student")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_adapters_heal_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        folder,
        capsys,
        "lora",
        "student={prune: {sizes: {intermediate_size: 32}, rounds: 2, heal: 2}, method: lora, rank: 2}",
    )
    pruned, student = weights(out / "models" / "pruned"), weights(out / "models" / "student")
    assert pruned.keys() == student.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert (pruned[name] != student[name]).any()
    name = "model.embed_tokens.weight"
    assert (pruned[name] == student[name]).all()


def test_another_model_than_the_teacher_can_be_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(folder, capsys, "other", "student={prune: {model: student, sizes: {num_hidden_layers: 1}}}")
    assert weights(out / "models" / "pruned")["model.embed_tokens.weight"].shape[1] == 32


def test_the_plan_says_what_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(folder, capsys, "plan", "recipe.yaml", HALF)
    assert ended.code == 0
    assert "student, cut out: hidden 64 -> 32, feed forward 96 -> 64;" in ended.out


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["student={prune: {ratio: 0.001}}"], ["student.prune", "0.001"]),
        (["student={prune: {sizes: {num_attention_heads: 3}}}"], ["num_attention_heads", "3"]),
        (["student={prune: {sizes: {hidden_size: 640}}}"], ["hidden_size", "640"]),
        (["student={prune: {sizes: {num_experts: 2}}}"], ["num_experts"]),
        (["student={prune: {ratio: 0.5, parameters: 100}}"], ["ratio", "parameters"]),
        (["student={prune: {ratio: 0.5, axes: [experts]}}"], ["experts"]),
        (["student={prune: {model: nowhere/at/all, ratio: 0.5}}"], ["student.prune.model", "nowhere/at/all"]),
        (
            ["student={prune: {ratio: 0.2, axes: [hidden]}}", "quantize={group_size: 64}"],
            ["ratio", "group_size"],
        ),
        (["student={prune: {ratio: 0.5, rounds: 2}}"], ["heal"]),
        (["student={prune: {dense: true}}"], ["dense", "llama"]),
        (["student={prune: {}}"], ["ratio", "sizes"]),
        (["student={prune: {ratio: 0.5}}", "teacher=null"], ["student.prune"]),
        ([HALF, "quantize={bits: 4, group_size: 128}"], ["group_size", "128", "model.embed_tokens"]),
    ],
)
def test_bad_pruning_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: list[str]
) -> None:
    before = contents(folder)
    extra = ["objective={cross_entropy: }"] if "teacher=null" in overrides else []
    ended = command(folder, capsys, "run", "recipe.yaml", "name=bad", *overrides, *extra)
    assert ended.code == 2
    assert len(ended.err) == 1, ended.err
    assert all(word in ended.err[0] for word in told), ended.err[0]
    assert contents(folder) == before


def test_a_type_that_cannot_be_cut_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    strange = make(tmp_path)
    path = strange / "teacher" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"model_type": "mamba2"}), encoding="utf-8"
    )
    ended = command(strange, capsys, "plan", "recipe.yaml", HALF)
    assert ended.code == 2 and "mamba2" in ended.err[0] and "llama" in ended.err[0]


def test_sparse_weights_stay_zero_to_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(folder, capsys, "sparse", "student={prune: {sparsity: {pattern: '2:4'}}}")
    pruned, student = weights(out / "models" / "pruned"), weights(out / "models" / "student")
    for name in pruned:
        if "proj" in name:
            zeros = pruned[name] == 0
            assert zeros.mean() == 0.5, name
            assert (student[name][zeros] == 0).all(), name
            assert (student[name][~zeros] != pruned[name][~zeros]).any(), name
    metrics = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert 0.2 < metrics["student"]["sparsity"] < 0.5
    assert mx.array(student["model.norm.weight"]).size > 0
