"""The estimate behind `source: auto`: its parts against arrays that are there, and what it decides."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny import EXPERTS, SHAPE, Ids, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.data.batch import Batches, Encoded, counted_places, in_order, make_batch
from mlx_distill.losses.menu import MENU
from mlx_distill.memory import (
    GIB,
    Estimate,
    Parts,
    Rows,
    decisions,
    estimate,
    machine_gib,
    table,
    with_sources,
)
from mlx_distill.memory.batches import of_measuring, of_training
from mlx_distill.memory.kernels import CPU, GPU, kernels
from mlx_distill.memory.models import models_of
from mlx_distill.memory.work import ANOTHER, ARRAYS, FROM_STORED, HEAD
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Grid, Shape
from mlx_distill.quantize import quantized
from mlx_distill.recipe import Recipe, decode
from mlx_distill.resident import resident
from mlx_distill.student import make_student

V = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, width) in enumerate({"teacher": 64, "student": 32}.items()):
        shape = Shape(**{**SHAPE, "hidden_size": width})
        models.save(root / name, models.build(shape, tiny_tokenizer(), seed))
    return {name: root / name for name in ("teacher", "student")}


def size(tree: Any) -> float:
    arrays: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in arrays) / GIB


def measured(recipe: Any, student: nn.Module) -> tuple[float, float, float]:
    """GiB of weights, gradients and moments that there are."""
    optimizer = make_optimizer(recipe.train)
    optimizer.init(student.trainable_parameters())
    moments = [
        (name, array)
        for name, array in tree_flatten(optimizer.state)  # type: ignore[arg-type]
        if name.rpartition(".")[2] in ("m", "v")
    ]
    return size(student.parameters()), size(student.trainable_parameters()), size(dict(moments))


@pytest.mark.parametrize(
    "student",
    [
        {"shape": {**SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": False}},
        {"shape": {**SHAPE, **EXPERTS}},
        {"model": "student", "method": "full"},
        {"model": "student", "method": "lora", "rank": 4},
        {"model": "student", "method": "lora", "rank": 4, "layers": 1},
    ],
    ids=["new", "new with experts", "full", "lora", "lora of a layer"],
)
def test_weights_gradients_and_moments_are_those_of_the_model(
    student: dict[str, Any], folders: dict[str, Path]
) -> None:
    if "model" in student:
        student = {**student, "model": str(folders["student"])}
    recipe = recipe_with(student)
    found = estimate(recipe, folders if "model" in student else {"teacher": folders["teacher"]}, V)
    model = make_student(recipe.student, Ids(V), 0).model
    expected = measured(recipe, model)
    for one, other in zip((found.weights, found.gradients, found.moments), expected, strict=True):
        assert one == pytest.approx(other, rel=0.06), (found, expected)  # norms, and headers of files
    weights = sum(path.stat().st_size for path in folders["teacher"].glob("*.safetensors")) / GIB
    assert weights < found.teachers["teacher"]
    arrays = ARRAYS["forward_kl"] + (HEAD if recipe.student.method == "full" else 0)
    assert found.logits == pytest.approx(4 * V * 4096 * arrays * kernels().logits / GIB)  # below `logits_mib`


def recipe_with(student: dict[str, Any], **teacher: Any) -> Recipe:
    return decode(
        {
            "name": "tiny",
            "student": student,
            "teacher": {"model": "embedded", **teacher},
            "data": {"train": {"source": "pocket", "rows": 10}},
            "objective": {"forward_kl": {}},
            "train": {"steps": 4, "learning_rate": 1e-2},
        }
    )


def test_a_token_takes_the_memory_of_the_experts_that_it_meets(tmp_path: Path) -> None:
    """Two of four experts of width 64 take that of one layer of width 128, and what each gives apart; built
    or loaded."""
    wide = {**SHAPE, "model_type": "qwen3", "intermediate_size": 128}
    models.save(tmp_path, models.build(Shape(**{**SHAPE, **EXPERTS}), tiny_tokenizer(), 0))
    students: list[dict[str, Any]] = [
        {"shape": wide},
        {"shape": {**SHAPE, **EXPERTS}},
        {"model": str(tmp_path)},
    ]
    kept = [
        estimate(recipe_with(student), {"teacher": tmp_path, "student": tmp_path}, V).activations
        for student in students
    ]
    assert kept[0] < kept[1] == kept[2] < 1.5 * kept[0]


def test_dora_keeps_what_its_matrices_give_before_they_are_scaled(folders: dict[str, Path]) -> None:
    lora, dora = (
        estimate(
            recipe_with({"model": str(folders["student"]), "method": method, "rank": 4}), folders, V
        ).activations
        for method in ("lora", "dora")
    )
    assert 1.1 * lora < dora < 1.6 * lora


def test_activations_follow_tokens_and_layers(folders: dict[str, Path]) -> None:
    def of(**train: Any) -> Estimate:
        recipe = tiny_recipe(train={"logits_mib": 1, **train}, data={"max_tokens": 64})
        return estimate(recipe, {"teacher": folders["teacher"]}, V)

    plain, twice = of(batch_tokens=960), of(batch_tokens=1920)  # whole rows of 64
    assert twice.activations == pytest.approx(2 * plain.activations)
    assert of(batch_tokens=960, gradient_checkpointing=True).activations < plain.activations
    assert plain.together == pytest.approx(plain.student + plain.logits + plain.teachers["teacher"])
    deep = {"shape": {**SHAPE, "num_hidden_layers": 24}}
    kept = [
        estimate(
            tiny_recipe(student=deep, train={"gradient_checkpointing": on}),
            {"teacher": folders["teacher"]},
            V,
        ).activations
        for on in (True, False)
    ]
    assert kept[0] < 0.25 * kept[1]


def test_losses_that_mlx_differentiates_hold_more_logits(folders: dict[str, Path]) -> None:
    def logits(*losses: str, **teacher: Any) -> float:
        recipe = tiny_recipe(objective={name: {} for name in losses}, teacher=teacher)
        return estimate(recipe, {"teacher": folders["teacher"]}, V).logits

    measured = {name for name, one in MENU.items() if one.family == "token" and one.needs_teacher}
    assert measured - {"policy_gradient"} == ARRAYS.keys()  # which needs a student that writes
    unit = logits("forward_kl") / (ARRAYS["forward_kl"] + HEAD)
    assert logits("jensen_shannon") == pytest.approx(unit * (ARRAYS["jensen_shannon"] + HEAD))
    assert logits("forward_kl", "reverse_kl") == logits("reverse_kl")
    assert logits("forward_kl", "cross_entropy") == logits("forward_kl")
    stored = {"source": "cache", "top_k": 8}  # for which all divergences are alike
    assert logits("jensen_shannon", **stored) == pytest.approx(unit * (FROM_STORED + HEAD))
    more = logits("jensen_shannon", "cross_entropy", **stored) - logits("cross_entropy", **stored)
    assert more == pytest.approx(unit * ANOTHER)


def test_teachers_that_are_stored_or_lent_take_nothing(folders: dict[str, Path]) -> None:
    student = {"model": str(folders["student"]), "method": "lora"}
    own = {"teacher": folders["teacher"], "student": folders["student"]}
    assert estimate(recipe_with(student, source="cache", top_k=8), own, V).teachers == {}
    assert estimate(recipe_with(student, source="auto", top_k=8), own, V).teachers.keys() == {"teacher"}
    assert estimate(recipe_with(student, model="student"), own, V).teachers == {}
    full = {**student, "method": "full"}
    assert estimate(recipe_with(full, model="student"), own, V).teachers.keys() == {"teacher"}


def test_a_quantized_teacher_counts_as_its_files(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = models.load(str(folders["teacher"]), "teacher.model")
    models.save(tmp_path, quantized(teacher, Grid(group_size=32)))
    whole, small = (
        models_of(tiny_recipe(), {"teacher": folder}, V, None).teachers["teacher"]
        for folder in (folders["teacher"], tmp_path)
    )
    assert small.bytes < 0.5 * whole.bytes


@pytest.mark.parametrize(("machine", "source"), [(2.0, "live"), (0.9, "cache")])
def test_auto_is_decided_for_all_teachers_alike(machine: float, source: str) -> None:
    others = [{"model": "x", "source": "auto", "top_k": 8, "cache": "y"}, {"model": "x"}]
    recipe = tiny_recipe(teacher={"source": "auto", "top_k": 8, "others": others})
    found = Estimate(0.2, 0.1, 0.2, 0.1, 0.1, {"teacher": 0.2, "teacher.others.0": 0.1}, machine)
    assert found.fits == (source == "live")
    decided = with_sources(recipe, found)
    assert [one.source for one in decided.teachers.values()] == [source, source, "live"]
    assert decided.teachers["teacher.others.0"].cache == ("y" if source == "cache" else None)
    lines = decisions(recipe, decided, found)
    assert [line.partition(" takes")[0] for line in lines] == [
        "teacher.source: auto",
        "teacher.others.0.source: auto",
    ]
    assert lines[0].endswith(f"an estimated 1 of {machine:g} GiB")
    plain = tiny_recipe()
    assert with_sources(plain, found) is plain
    assert decisions(plain, plain, found) == []


def test_what_the_machine_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_distill.memory.estimates.memory_gib", lambda: 16.0)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "x"})
    assert machine_gib() == 12.0
    monkeypatch.setattr("mlx_distill.memory.estimates.memory_gib", lambda: None)
    assert machine_gib() == math.inf
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 11 * GIB})
    assert machine_gib() == 11.0


def rows(*lengths: int) -> list[Encoded]:
    return [Encoded([3] * length, 4) for length in lengths]


def test_shapes_of_batches_are_those_that_training_meets() -> None:
    options = tiny_recipe(train={"batch_tokens": 256, "steps": 6}).train
    some = rows(*[30] * 20, *[60] * 20, 100)
    real = Batches(some, 256, 0)
    expected = {(*real[i].tokens.shape, counted_places(real[i]).size) for i in range(6)}
    assert set(of_training(some, options, 0)) == expected
    for index, indices in enumerate(in_order(some, 256)):
        batch = make_batch([some[i] for i in indices])
        shape = of_measuring([some[i] for i in indices], 256)
        assert shape == [(*batch.tokens.shape, int(batch.counted.sum()))], index


def test_freed_arrays_of_other_shapes_are_kept_on_the_cpu_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train={"batch_tokens": 1024, "steps": 50})

    def activations(*lengths: int) -> float:
        found = Rows(rows(*[length for length in lengths for _ in range(40)]))
        return estimate(recipe, {"teacher": folders["teacher"]}, V, rows=found).activations

    monkeypatch.setattr("mlx_distill.memory.estimates.kernels", lambda: CPU)
    one, both = activations(100), activations(50, 100)
    assert both > 1.3 * one
    assert activations(*range(20, 120, 5)) > 1.5 * both
    many = Rows(rows(*[length for length in range(20, 120, 5) for _ in range(40)]))

    def together(**train: Any) -> float:
        limited = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
        return estimate(limited, {"teacher": folders["teacher"]}, V, rows=many).together

    kept = []
    for keeps in (1e4, 2e4):  # no more than the allocator's limit
        few = CPU._replace(keeps=keeps)
        monkeypatch.setattr("mlx_distill.memory.estimates.kernels", lambda few=few: few)
        kept.append(together())
    assert kept[1] - kept[0] == pytest.approx(1e4 / GIB)
    monkeypatch.setattr("mlx_distill.memory.estimates.kernels", lambda: CPU)
    assert together() > 1.5 * kept[1]
    assert together(memory_gib=4e4 / GIB) == kept[0]  # a quarter of what a recipe lends
    monkeypatch.setattr("mlx_distill.memory.estimates.kernels", lambda: GPU)
    assert activations(50, 100) == activations(100)


def test_every_stage_that_works_is_told(folders: dict[str, Path]) -> None:
    found = Rows(rows(20, 30), [8, 9], rows(20), rows(20))
    recipe = tiny_recipe(
        student={"shape": None, "model": str(folders["student"]), "method": "full"},
        teacher={"source": "cache", "top_k": 8},
        data={"prompts": {"source": "pocket", "rows": 4}},
        quantize={"method": "qad", "bits": 4},
        evaluate={"tasks": ["fidelity"]},
    )
    whole = estimate(recipe, folders, V, rows=found)
    stages = whole.by_stage
    assert [*stages] == ["probes of teachers", "probes", "generate", "cache", "train", "quantize", "evaluate"]
    assert stages["probes"].together >= whole.together  # a step at full size is among them
    assert all(min(parts) >= 0 and parts.activations > 0 for parts in stages.values())
    assert all(parts.logits > 0 for parts in stages.values())
    weights = stages["evaluate"].teachers  # of the teacher, wherever it is needed
    without = [name for name, parts in stages.items() if parts.teachers != weights]
    assert without == ["probes", "train"] and stages["train"].teachers == 0
    assert whole.together == stages["train"].together == pytest.approx(whole.student + whole.logits)
    assert "evaluate" not in estimate(tiny_recipe(), folders, V, rows=found).stages


def test_the_table_adds_up() -> None:
    stages = {"evaluate": Parts(student=1.0, activations=2.0), "cache": Parts(teachers=0.5)}
    told = Estimate(0.5, 0.1, 0.2, 0.1, 0, {"teacher": 0.15}, 2.0, stages=stages, teaching=0.05)
    assert (told.peak, told.at, told.fits) == (3.0, "evaluate", False)
    assert told.together == pytest.approx(told.student + 0.15)
    assert [" ".join(line.split()) for line in table(told)] == [
        "memory, GiB teachers student optimizer activations logits process together",
        "cache 0.5 0.5",
        "train 0.1 0.5 0.3 0.15 1.1",
        "evaluate 1 2 3",
        "the most is evaluate, 3 GiB, which does not fit in the 2 GiB that a run may take here",
    ]
    heading, *rows, _ = table(told)
    assert len({len(heading), *map(len, rows)}) == 1  # in columns
    unknown = told._replace(machine=math.inf)
    assert unknown.fits and [*table(unknown)][-1].endswith("does not tell how much memory there is")


def test_auto_is_decided_by_what_a_live_teacher_takes(folders: dict[str, Path]) -> None:
    """While it validates, too."""
    found = Rows(rows(20, 30), [], rows(*[60] * 20))
    sources: list[dict[str, Any]] = [{"source": "auto", "top_k": 8}, {"source": "live", "top_k": 8}]
    train = {"eval_every": 2, "batch_tokens": 64}
    asked, live = (
        estimate(tiny_recipe(teacher=teacher, train=train), folders, V, rows=found) for teacher in sources
    )
    assert asked == live


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_few_bits_leave_the_type_of_activations(
    dtype: mx.Dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A teacher rounded as it is loaded, and one stored in few bits."""
    teacher = models.load(str(folders["teacher"]), "teacher.model")
    teacher.model.set_dtype(dtype)
    for name, model in {"whole": teacher, "few": quantized(teacher, Grid(group_size=32))}.items():
        models.save(tmp_path / name, model)
    loaded = models.load(str(tmp_path / "few"), "teacher.model").model
    assert loaded(mx.array([[1, 2]])).dtype == dtype
    rounded = tiny_recipe(teacher={"quantize": {"bits": 4, "group_size": 32}})
    for recipe, name in ((rounded, "whole"), (tiny_recipe(), "few")):
        assert models_of(recipe, {"teacher": tmp_path / name}, V, None).teachers["teacher"].each == dtype.size


def test_configurations_of_the_benchmark_are_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The drawn ones, too; a seed always draws the same, and says what is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    bench = importlib.import_module("plan_bench")
    for seed in range(40):
        case = bench.drawn(seed)
        assert case == bench.drawn(seed) != bench.drawn(seed, 1)
        recipe = decode(bench.recipe_of(case, tmp_path))
        assert f", {recipe.student.method}, {' + '.join(recipe.objective)}" in case.what
        assert (recipe.teacher is None) == (case.teacher is None)
    for name in [*bench.CASES, *bench.CALIBRATION]:
        decode(bench.recipe_of(bench.named(name), tmp_path))
    assert bench.named("drawn 7.1") == bench.drawn(7, 1)


@pytest.mark.slow
@pytest.mark.skipif(resident("VmHWM") is None or mx.default_device() != mx.cpu, reason="not told here")
def test_a_step_takes_what_is_predicted() -> None:
    """In a process of its own; `benchmarks/plan_bench.py` measures whole runs."""
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "benchmarks/plan_bench.py", "--only", "plain"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    [predicted, measured] = re.findall(r"train \((\d+), (\d+)\)", done.stdout)[0]
    assert 0.8 < int(predicted) / int(measured) < 1.25, done.stdout
