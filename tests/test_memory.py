"""The estimate behind `source: auto`: its parts against arrays that are there, and what it decides."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny import EXPERTS, SHAPE, Ids, tiny_recipe, tiny_tokenizer

from mlx_distill import memory, models
from mlx_distill.memory import GIB, Estimate, breakdown, decisions, estimate, with_sources
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Quantize, Shape
from mlx_distill.quantize import quantized
from mlx_distill.recipe import Recipe, decode
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
    assert found.logits == pytest.approx(2 * 18 * 4096 * V / GIB)  # less than `logits_mib`


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
    """Two of four experts of width 64 take that of one layer of width 128, built or loaded."""
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
    assert kept[0] == kept[1] == kept[2]


def test_activations_follow_tokens_and_layers(folders: dict[str, Path]) -> None:
    def of(**train: Any) -> Estimate:
        recipe = tiny_recipe(train={"logits_mib": 1, **train}, data={"max_tokens": 64})
        return estimate(recipe, {"teacher": folders["teacher"]}, V)

    plain, twice = of(batch_tokens=1000), of(batch_tokens=2000)
    assert twice.activations == pytest.approx(2 * plain.activations)
    assert of(batch_tokens=1000, gradient_checkpointing=True).activations < 0.7 * plain.activations
    assert plain.together == pytest.approx(plain.student + plain.logits + plain.teachers["teacher"])


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
    models.save(tmp_path, quantized(teacher, Quantize(group_size=32)))
    whole = estimate(tiny_recipe(train={"batch_tokens": 1}), {"teacher": folders["teacher"]}, V)
    small = estimate(tiny_recipe(train={"batch_tokens": 1}), {"teacher": tmp_path}, V)
    assert small.teachers["teacher"] < 0.5 * whole.teachers["teacher"]


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
    assert breakdown(found).endswith(
        f"teacher 0.2, teacher.others.0 0.1, logits 0.1; together 1 of {machine:g} GiB"
    )
    plain = tiny_recipe()
    assert with_sources(plain, found) is plain
    assert decisions(plain, plain, found) == []


def test_what_the_machine_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_gib", lambda: 16.0)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "x"})
    assert memory.machine_gib() == 12.0
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 11 * GIB})
    assert memory.machine_gib() == 11.0
