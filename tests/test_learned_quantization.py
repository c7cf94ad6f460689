"""Few bits that learn: gradients, grids, what moves, what is kept, and how a run goes on."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill import models, pipeline, recipe
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, Encoded, make_batch
from mlx_distill.errors import RecipeError
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize
from mlx_distill.prune.sparse import masks_of, sparsity_of
from mlx_distill.quantize import fake, learned
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.rounding import quantized
from mlx_distill.run import StageLog
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50
METHODS = pytest.mark.parametrize("method", ["dwq", "qad"])
FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def level(method: str = "qad", **options: Any) -> Level:
    return levels(Quantize.model_validate({"method": method, "bits": 3, "group_size": 32, **options}))[0]


def learning(at: Level, *, bits: dict[str, int] | None = None, seed: int = 0) -> Loaded:
    """A tiny model in learning, what it learns moved away from rounding to the nearest."""
    loaded = learned.in_learning(tiny_model(V), at, bits)
    random = np.random.default_rng(seed)
    for _, module in loaded.model.named_modules():
        for name in {"low", "high", "moves", "lora_b"} & set(module):
            module[name] = mx.array(0.3 * random.standard_normal(module[name].shape), dtype=mx.float32)
    return loaded


def trained(
    at: Level, steps: int = 10, *, compiled: bool = False, masks: Any = None, student: Any = None, **more: Any
) -> Loaded:
    """A tiny model after some steps towards itself before rounding."""
    loaded = learned.in_learning(student or tiny_model(V), at, **more)
    teacher = LiveTeacher(tiny_model(V), V)
    plain = tiny_recipe(train={"compile": compiled, "beta2": 0.99, "learning_rate": 1e-2})
    how = learned.recipe_of(
        plain, at.options.model_copy(update={"steps": steps}), "student", "tests/no/such/folder"
    )
    log: Any = SimpleNamespace(
        stage="student-3bit",
        interrupts=SimpleNamespace(number=None, check=lambda: None),
        steps=lambda first, last: range(first, last + 1),
        restore=lambda *_: learned_counters(),
        metrics=lambda counters, *_: counters.close_window(),
    )
    train(loaded.model, [teacher], Batches(rows_of([20] * 32), 256, 0), how, V, log, masks=masks)
    return loaded


def learned_counters() -> Any:
    from mlx_distill.run import Counters

    return Counters()


def dequantized(model: nn.Module) -> dict[str, mx.array]:
    """The weights that every quantized layer stands for."""
    return {
        path: mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=mx.float32,
        )
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


def computed(model: nn.Module, values: fake.Values) -> dict[str, mx.array]:
    """The weights that every learning layer computes with."""
    return {
        path: values(module, None).astype(mx.float32)
        for path, module in model.named_modules()
        if hasattr(module, "stored")
    }


# Gradients


class Tied(nn.Module):
    """An embedding that is looked up and read out of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(6, 64)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layer.as_linear(mx.tanh(self.layer(tokens)))


class Routed(nn.Module):
    """Experts, chosen by hand."""

    def __init__(self) -> None:
        super().__init__()
        from mlx_lm.models.switch_layers import SwitchLinear

        self.layer = SwitchLinear(64, 5, 3)

    def __call__(self, x: mx.array) -> mx.array:
        chosen = mx.array([[0, 2], [2, 1], [0, 1], [1, 2]])
        return self.layer(x[:, None, None], chosen)


def small(kind: str) -> tuple[nn.Module, mx.array]:
    """A module with one layer of 64 inputs, and what it reads."""
    mx.random.seed(3)
    x = mx.random.normal((4, 64))
    if kind == "experts":
        return Routed(), x
    if kind == "embedding":
        return Tied(), mx.array([[0, 3, 5], [1, 1, 2]])
    module = nn.Sequential(nn.Linear(64, 5, bias=kind == "bias"))
    return module, x


def only_grid(model: nn.Module, bits: int = 3) -> dict[str, dict[str, Any]]:
    [path] = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    return {path: {"bits": bits, "group_size": 32, "mode": "affine"}}


KINDS = pytest.mark.parametrize("kind", ["linear", "bias", "embedding", "experts"])


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_scales_and_biases_by_finite_differences(kind: str, compiled: bool) -> None:
    """Of the ends of each grid, which scales and biases are linear in."""
    model, x = small(kind)
    fake.learn_scales(model, only_grid(model))
    loss = nn.value_and_grad(model, lambda x: mx.square(model(x) - 0.5).sum())
    if compiled:
        loss = mx.compile(loss, inputs=[model.state], outputs=[model.state])
    start = dict(tree_flatten(model.trainable_parameters()))
    assert {name.rpartition(".")[2] for name in start} == {"low", "high"}
    _, tree = loss(x)
    gradients = dict(tree_flatten(tree))
    random = np.random.default_rng(0)
    for name, array in start.items():
        for _ in range(4):
            direction = mx.array(random.standard_normal(array.shape), dtype=mx.float32)
            ends = []
            for step in (0.02, -0.02):
                model.load_weights([(name, array + step * direction)], strict=False)
                ends.append(float(loss(x)[0]))
            model.load_weights([(name, array)], strict=False)
            expected = (ends[0] - ends[1]) / 0.04
            found = float((gradients[name] * direction).sum())
            assert found == pytest.approx(expected, rel=2e-2, abs=2e-2 * abs(expected) + 1e-3)
            assert abs(expected) > 1e-2


def test_gradient_of_a_scale_is_that_of_its_codes() -> None:
    """In NumPy: a scale multiplies the codes of its group, a bias is added to each."""
    random = np.random.default_rng(1)
    weight, slope = random.standard_normal((2, 3, 64))
    codes, scales, biases = mx.quantize(mx.array(weight, dtype=mx.float32), 32, 3)
    plain = np.array(mx.dequantize(codes, mx.ones_like(scales), mx.zeros_like(biases), 32, 3))
    outer = mx.array(slope, dtype=mx.float32)

    def loss(scales: mx.array, biases: mx.array) -> mx.array:
        return (mx.dequantize(codes, scales, biases, 32, 3) * outer).sum()

    by_scale, by_bias = mx.grad(loss, (0, 1))(scales, biases)
    groups = slope.reshape(3, 2, 32)
    np.testing.assert_allclose(np.array(by_scale), (groups * plain.reshape(3, 2, 32)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(np.array(by_bias), groups.sum(-1), rtol=1e-4)


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_the_straight_through_gradient_is_that_at_the_rounded_weights(kind: str, compiled: bool) -> None:
    plain, x = small(kind)
    [(path, grid)] = only_grid(plain).items()
    layer = dict(plain.named_modules())[path]
    original = layer.weight
    layer.weight = mx.dequantize(*mx.quantize(original, **grid), **grid)
    plain.unfreeze()
    _, expected = nn.value_and_grad(plain, lambda x: mx.square(plain(x) - 0.5).sum())(x)
    model, _ = small(kind)
    fake.learn_weights(model, {path: grid})
    loss = nn.value_and_grad(model, lambda x: mx.square(model(x) - 0.5).sum())
    if compiled:
        loss = mx.compile(loss, inputs=[model.state], outputs=[model.state])
    _, found = loss(x)
    unit = dict(model.named_modules())[path].unit
    by_weight = dict(tree_flatten(expected))[f"{path}.weight"]
    by_move = dict(tree_flatten(found))[f"{path}.moves"] / unit
    assert float(mx.abs(by_weight).max()) > 0.1
    assert largest_gap({"": by_move}, {"": by_weight}) < 1e-5

    # The usual mistake: through MLX's own rounding only the two ends of a group get any.
    def straight(weight: mx.array) -> mx.array:
        return mx.square(mx.dequantize(*mx.quantize(weight, **grid), **grid)).sum()

    assert float((mx.grad(straight)(original) != 0).astype(mx.float32).mean()) < 0.1
    assert float((by_weight != 0).astype(mx.float32).mean()) > 0.6


# Grids


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["affine 2", "affine 3", "affine 4", "affine 5", "affine 8", *FIXED])
def test_what_learns_is_exactly_what_is_saved(mode: str, dtype: str) -> None:
    """Also behind moves, and with the type that scales will have."""
    name, _, bits = mode.partition(" ")
    shape = (
        {"bits": int(bits), "group_size": 32}
        if bits
        else dict(zip(("bits", "group_size"), FIXED[name], strict=True))
    )
    for method in ["qad"] + ["dwq"] * bool(bits):
        at = level(method, mode=name, dtype=dtype, **shape)
        one = learning(at)
        saved = learned.finished(tiny_model(V), at, None, fake.learned(one.model))
        inside = computed(one.model, fake.of_codes if method == "dwq" else fake.nearest)
        outside = dequantized(saved.model)
        assert inside.keys() == outside.keys() and len(inside) == 15
        for path, weight in inside.items():
            assert mx.array_equal(weight, outside[path]), (method, path)
        plain = dequantized(quantized(tiny_model(V), at.grid, None, dtype).model)
        assert any(not mx.array_equal(plain[path], outside[path]) for path in plain)


def test_a_symmetric_grid_would_be_another() -> None:
    """The usual mistake: fake quantization between -absmax and absmax is none of MLX's."""
    at = level(bits=4)
    one = learned.in_learning(tiny_model(V), at)
    [path] = [path for path in computed(one.model, fake.nearest) if path.endswith("layers.0.mlp.up_proj")]
    weight = dict(tiny_model(V).model.named_modules())[path].weight
    scale = mx.abs(weight).max(-1, keepdims=True) / 7
    symmetric = scale * mx.clip(mx.round(weight / scale), -8, 7)
    found = computed(one.model, fake.nearest)[path]
    assert float(mx.abs(found - symmetric).max()) > 1e-3
    assert mx.array_equal(
        found, dequantized(quantized(tiny_model(V), at.grid).model)[path].astype(mx.float32)
    )


@METHODS
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"mixed": [2, 8]}])
def test_the_saved_model_computes_what_the_learning_one_does(method: str, options: dict[str, Any]) -> None:
    if method == "dwq" and "rank" in options:
        pytest.skip("LoRA matrices are qad's")
    at = level(method, **options)
    bits = {"model.layers.0.self_attn.q_proj": 8, "model.embed_tokens": 2} if "mixed" in options else None
    one = learning(at, bits=bits)
    saved = learned.finished(tiny_model(V), at, bits, fake.learned(one.model))
    if bits:
        assert saved.config["quantization"]["model.embed_tokens"]["bits"] == 2
    tokens = make_batch(rows_of([12, 9])).tokens
    expected = one.model(tokens)
    assert float(mx.abs(saved.model(tokens) - expected).max()) < 1e-4 * float(mx.abs(expected).max())
    whole = tiny_model(V).model(tokens)
    assert float(mx.abs(whole - expected).max()) > 1e-2 * float(mx.abs(expected).max())


@METHODS
def test_before_learning_it_is_the_rounded_model(method: str) -> None:
    at = level(method)
    one = learned.in_learning(tiny_model(V), at)
    rounded = dequantized(quantized(tiny_model(V), at.grid).model)
    found = computed(one.model, fake.of_codes if method == "dwq" else fake.nearest)
    assert all(mx.array_equal(found[path], weight) for path, weight in rounded.items())


# What moves


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"method": "dwq"}, {"low", "high"}),
        ({"method": "qad"}, {"moves"}),
        ({"method": "qad", "rank": 2}, {"lora_a", "lora_b"}),
    ],
)
def test_only_what_learns_moves_and_it_is_in_float32(options: dict[str, Any], names: set[str]) -> None:
    student = tiny_model(V)
    student.model.set_dtype(mx.bfloat16)
    at = level(**options)
    one = learned.in_learning(student, at)
    moving = dict(tree_flatten(one.model.trainable_parameters()))
    assert {name.rpartition(".")[2] for name in moving} == names
    assert {array.dtype for array in moving.values()} == {mx.float32}
    before = dict(tree_flatten(one.model.parameters()))
    done = dict(tree_flatten(trained(at, 3, student=student_in_halves()).model.parameters()))
    for name, array in before.items():
        assert mx.array_equal(array, done[name]) == (name not in moving), name
        assert done[name].dtype == array.dtype


def student_in_halves() -> Loaded:
    student = tiny_model(V)
    student.model.set_dtype(mx.bfloat16)
    return student


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_an_update_moves_a_weight_by_that_share_of_a_step(bits: int, rank: int | None) -> None:
    """A gradient of one sign everywhere, as AdamW makes it: of the size of the learning rate."""
    model, _ = small("linear")
    fake.learn_weights(model, only_grid(model, bits), rank=rank)
    layer: Any = model.layers[0]  # type: ignore[attr-defined]
    _, step, _ = mx.quantize(layer.weight, 32, bits)
    assert float(layer.unit) == pytest.approx(float(mx.abs(step).mean()), rel=0.4)  # some values lie beyond
    before = fake.moved(layer)
    name = "moves" if rank is None else "lora_b"
    layer[name] = layer[name] + 0.01
    by = mx.sqrt(mx.square(fake.moved(layer) - before).mean()) / layer.unit
    assert 0.2 * 0.01 < float(by) < 3 * 0.01


def test_gradient_checkpointing_leaves_the_gradient_alone() -> None:
    from mlx_distill.student import checkpoint_layers

    found = []
    for checkpointed in (False, True):
        one = learning(level("dwq"))
        if checkpointed:
            checkpoint_layers(one.model)
        found.append(_sums(one))
    assert largest_gap(found[1], found[0]) < 1e-5


@METHODS
def test_compiled_and_plain_steps_give_the_same_numbers(method: str) -> None:
    """And in chunks of the last projection, which is the embedding here."""
    plain = _sums(learning(level(method)))
    for options in ({"compile": True}, {"logits_mib": 1}):
        assert largest_gap(_sums(learning(level(method)), **options), plain) < 1e-5
    assert all(float(mx.abs(array).max()) > 0 for array in plain.values())


def _sums(student: Loaded, **options: Any) -> dict[str, mx.array]:
    from mlx_distill.optimizer import make_optimizer

    how = tiny_recipe(objective={"forward_kl": {}}, train={"compile": False, **options})
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    batch = make_batch(rows_of([40] * 8))
    objective = make_objective(student.model, [teacher], how, V)
    if "logits_mib" in options:
        objective.chunk = 16
    step = make_step(objective, make_optimizer(how.train), how)
    return dict(tree_flatten(step.gradients(batch, [teacher.targets(batch)], {})[0]))


@pytest.mark.parametrize("options", [{"method": "dwq"}, {"method": "qad"}, {"method": "qad", "rank": 4}])
def test_the_divergence_falls(options: dict[str, Any]) -> None:
    at, teacher, rows = level(**options), LiveTeacher(tiny_model(V), V), rows_of([20] * 16, seed=5)
    before = fidelity(learned.in_learning(tiny_model(V), at).model, rows, V, teacher=teacher)["kl"]
    one = trained(at, 60)
    assert fidelity(one.model, rows, V, teacher=teacher)["kl"] < 0.8 * before
    saved = learned.finished(tiny_model(V), at, None, fake.learned(one.model))
    assert fidelity(saved.model, rows, V, teacher=teacher)["kl"] < 0.8 * before


def test_zeros_of_a_sparse_student_stay() -> None:
    def sparse() -> Loaded:
        student = tiny_model(V)
        layer: Any = student.model.layers[0].mlp.up_proj  # type: ignore[attr-defined]
        layer.weight = mx.where(mx.abs(layer.weight) < 0.05, 0, layer.weight)
        return student

    at = level(bits=4)
    masks = {path.replace(".weight", ".moves"): mask for path, mask in masks_of(sparse().model).items()}
    share = sparsity_of(sparse().model)
    kept = fake.learned(trained(at, student=sparse(), masks=masks).model)
    saved = learned.finished(sparse(), at, None, kept)
    assert sparsity_of(saved.model) >= share > 0.01
    lost = fake.learned(trained(at, student=sparse()).model)  # without masks they learn too
    zero = sparse().model.layers[0].mlp.up_proj.weight == 0  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.up_proj.weight"
    assert bool(mx.where(zero, kept[name], 0).any()) is False
    assert bool(mx.where(zero, lost[name], 0).any()) is True


# Rows that are kept apart


def work_of(rows: list[Encoded], valid: list[Encoded], prompts: list[list[int]] | None = None) -> Any:
    asked = [SimpleNamespace(row=None, tokens=tokens) for tokens in prompts or []]
    prepared = SimpleNamespace(valid=valid, prompts=asked)
    return SimpleNamespace(prepared=prepared, recipe=tiny_recipe(), rows=rows)


@pytest.mark.parametrize(("count", "apart"), [(1, 1), (2, 1), (12, 1), (60, 3)])
def test_some_lessons_are_kept_apart(count: int, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([5] * count)
    found = learned.Lessons([], rows, ["train"] * count, [None] * count)._replace(rows=[None] * count)  # type: ignore[list-item]
    monkeypatch.setattr(learned, "lessons", lambda work: found)
    one = learned._rows(work_of(rows, []))
    assert len(one.valid) == apart and "apart" in one.judged_on
    assert len(one.learned.encoded) == len(one.learned.sources) == max(1, count - apart)
    if count > 1:
        assert not {tuple(row.tokens) for row in one.valid} & {tuple(r.tokens) for r in one.learned.encoded}
    assert learned._rows(work_of(rows, [])).valid == one.valid
    valid = rows_of([4] * 2)
    one = learned._rows(work_of(rows, valid))
    assert (one.valid, one.judged_on, len(one.learned.encoded)) == (valid, "data.valid", count)


def test_a_student_without_lessons_learns_on_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "lessons", lambda work: learned.Lessons([], [], [], []))
    one = learned._rows(work_of([], rows_of([4]), [[5, 6, 7], [8], [9, 10]]))
    assert one.learned.encoded == [Encoded([5, 6, 7], 1), Encoded([9, 10], 1)]
    assert (one.learned.sources, one.learned.prompts) == (["prompts", "prompts"], [0, 2])


# Recipes


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {
                "student": {"shape": None, "model": "x"},
                "teacher": None,
                "objective": {"cross_entropy": {}},
                "quantize": {"towards": "teacher"},
            },
            "`quantize.towards` teacher: the recipe names no `teacher`; use student",
        ),
        (
            {
                "student": {"shape": None, "model": "x"},
                "teacher": {"model": "student", "ema": 0.9},
                "quantize": {"towards": "teacher"},
            },
            "`quantize.towards` teacher: it is a moving average of the student, gone once that is trained; "
            "use student",
        ),
        (
            {"teacher": {"source": "cache", "top_k": 4}, "quantize": {"temperature": 2.0}},
            "`quantize.temperature` 2: the teacher's targets are stored at 1, the temperature of "
            "`objective`; use that, or `quantize.towards` student",
        ),
        (
            {
                "student": {"shape": None, "prune": {"sparsity": {}}},
                "quantize": {"method": "dwq"},
            },
            "`quantize.method` dwq moves whole groups of weights, and with them the zeros of "
            "`student.prune.sparsity`; use qad or rtn",
        ),
        (
            {"student": {"shape": None, "prune": {"sparsity": {}}}, "quantize": {"rank": 4}},
            "`quantize.rank` 4: LoRA matrices would fill the zeros of `student.prune.sparsity`; drop it",
        ),
    ],
)
def test_refused_before_anything_is_read(sections: dict[str, Any], line: str) -> None:
    given = {"method": "qad", "group_size": 32, **sections.pop("quantize")}
    with pytest.raises(RecipeError) as error:
        tiny_recipe(quantize=given, **sections)
    assert str(error.value).splitlines() == [f"recipe: {line}"]


def test_a_cache_of_another_temperature_does_when_the_student_is_learned_from() -> None:
    made = {"method": "dwq", "group_size": 32, "temperature": 2.0, "towards": "student"}
    tiny_recipe(teacher={"source": "cache", "top_k": 4}, quantize=made)


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


SHORT = ["train.steps=3", "evaluate={tasks: [], baseline: false}", "export.formats=[]", "train.compile=false"]
STEPS = "quantize={method: dwq, bits: 3, group_size: 32, steps: 6}"


def run(folder: Path, name: str, *overrides: str, **how: Any) -> tuple[Path, dict[str, Any], str]:
    """The run folder, what was measured of its first level, and what was said."""
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = recipe.load("recipe.yaml", [f"name={name}", *SHORT, *overrides])
        found = folder / pipeline.run(loaded, Console(lines), **{"upto": "quantize", **how})
    stages = json.loads((found / "stages.json").read_text())
    return found, next(iter(stages["quantize"]["measured"].values())), lines.getvalue()


@pytest.mark.parametrize(
    ("overrides", "towards"),
    [
        ([STEPS], "teacher"),
        ([STEPS, "quantize.method=qad", "data.valid=good.jsonl"], "teacher"),
        ([STEPS, "quantize.method=qad", "quantize.rank=2", "quantize.towards=student"], "student"),
        ([STEPS, "teacher=null", "objective={cross_entropy: }", "student={model: student}"], "student"),
        ([STEPS, "teacher={model: teacher, source: cache, top_k: 8}"], "teacher"),
        (
            [STEPS, "teacher={model: teacher, source: cache, top_k: 8}", "objective={cross_entropy: }"],
            "teacher",
        ),
        (
            [STEPS, "teacher={model: stranger}", "objective={cross_tokenizer: }", "student={model: student}"],
            "student",
        ),
        ([STEPS, "teacher={model: student, ema: 0.9}", "student={model: student}"], "student"),
        ([STEPS, "quantize.mixed=[2, 4]", "quantize.dtype=float16", "quantize.rows=4"], "teacher"),
        ([STEPS, "quantize.method=qad", "quantize.mode=nvfp4", "quantize.group_size=16"], "teacher"),
    ],
)
def test_runs(folder: Path, overrides: list[str], towards: str) -> None:
    if "quantize.mode=nvfp4" in overrides:
        overrides = ["quantize={method: qad, mode: nvfp4, steps: 6}"]
    path, measured, said = run(folder, "runs", *overrides, overwrite=True)
    assert measured["towards"] == towards
    assert f"KL to the {towards}" in said
    where = "data.valid" if "data.valid=good.jsonl" in overrides else "the lessons, which were kept apart"
    assert f"rows of {where}" in said
    assert measured["kept"] == (measured["after_kl"] < measured["before_kl"])
    assert measured["train_tokens"] > 0 and measured["train_seconds"] > 0
    stages = json.loads((path / "stages.json").read_text())["quantize"]
    assert (path / "models" / stages["models"][0] / "model.safetensors").exists()
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in steps if line["stage"] == stages["models"][0]]
    assert [line["step"] for line in own] == [1, 2, 3, 4, 5, 6]
    assert all("forward_kl" in line and "cross_entropy" not in line for line in own)


def test_a_foreign_teacher_is_refused_where_it_is_asked_for(folder: Path) -> None:
    with pytest.raises(RecipeError, match="`quantize.towards` teacher: its tokens are others"):
        run(
            folder,
            "foreign",
            STEPS,
            "quantize.towards=teacher",
            "teacher={model: stranger}",
            "objective={cross_tokenizer: }",
            "student={model: student}",
        )


@METHODS
def test_what_is_no_better_is_not_kept(folder: Path, method: str) -> None:
    """Wild learning ends worse than rounding, which then is what is saved, to the bit."""
    wild = [STEPS, f"quantize.method={method}", "quantize.learning_rate=1000.0"]
    path, measured, said = run(folder, f"wild-{method}", *wild)
    assert measured["kept"] is False and measured["after_kl"] >= measured["before_kl"]
    assert "the rounded model is kept (no nearer)" in said
    plain = quantized(models.load(str(path / "models/student"), "student"), level().grid)
    saved: Any = mx.load(str(path / "models/student-3bit/model.safetensors"))
    for name, array in tree_flatten(plain.model.parameters()):
        assert mx.array_equal(saved[name], array), name


def test_training_that_diverges_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any, **__: Any) -> None:
        raise learned.Diverged("the gradient is not finite")

    monkeypatch.setattr(learned, "train", diverged)
    _, measured, said = run(folder, "diverged", STEPS)
    assert (measured["kept"], measured["after_kl"]) == (False, None)
    assert "the rounded model is kept (training diverged; lower `quantize.learning_rate`)" in said


class Killed(Exception):
    """As a process that is not there any more."""


def killed(step: int, *how: Any) -> None:
    """A run that ends at a step of its first level."""
    plain = StageLog.metrics

    def metrics(self: StageLog, counters: Any, *rest: Any) -> None:
        if self.stage.startswith("student-") and counters.step == step:
            raise Killed
        plain(self, counters, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "metrics", metrics)
        with pytest.raises(Killed):
            run(*how)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "models/student-3bit").iterdir()}


@METHODS
def test_a_killed_run_goes_on_to_the_same_bits(folder: Path, method: str) -> None:
    options = [STEPS, f"quantize.method={method}", "train.save_every=2", "train.steps=5"]
    whole, expected, _ = run(folder, f"whole-{method}", *options)
    killed(5, folder, f"killed-{method}", *options)
    path = folder / "runs" / f"killed-{method}"
    assert sorted(one.name for one in (path / "checkpoints").glob("student-3bit-*")) == [
        "student-3bit-step-000002",
        "student-3bit-step-000004",
    ]
    path, found, said = run(folder, f"killed-{method}", *options, resume=True)
    assert "student-3bit: going on from step 4" in said
    assert files(path) == files(whole)
    assert found | {"train_seconds": 0} == expected | {"train_seconds": 0}


def test_checkpoints_of_other_options_are_not_gone_on_from(folder: Path) -> None:
    options = [STEPS, "train.save_every=2", "train.steps=5"]
    killed(5, folder, "changed", *options)
    kept = folder / "kept"
    shutil.copytree(folder / "runs" / "changed", kept)
    for change in ("quantize.learning_rate=0.02", "data.valid=good.jsonl", "quantize.method=qad"):
        shutil.rmtree(folder / "runs" / "changed")
        shutil.copytree(kept, folder / "runs" / "changed")
        path, _, said = run(folder, "changed", *options, change, resume=True)
        assert "going on from" not in said
        fresh, *_ = run(folder, "fresh", *options, change, overwrite=True)
        assert files(path) == files(fresh)
