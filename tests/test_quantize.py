"""Rounding to the nearest: MLX's grids, what is saved, what it weighs, and what is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_upstream import tiny
from tiny import rows_of, tiny_model, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.evaluate.model import TestSet, measure
from mlx_distill.interrupt import Interrupts
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate, Grid, Quantize, Shape
from mlx_distill.progress import silent
from mlx_distill.quantize import bits_per_weight, check_groups, levels, quantized, stage
from mlx_distill.quantize.checks import check_loaded_student, check_type
from mlx_distill.quantize.mixed import layer_harms
from mlx_distill.quantize.rounding import cast, layer_grids, plain_layers

BITS = (2, 3, 4, 5, 6, 8)
GRIDS = [Grid(bits=bits, group_size=size) for bits in BITS for size in (32, 64, 128)]
GRIDS += [Grid.model_validate({"mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4")]
TOKENS = mx.array([[3, 5, 7, 11, 13, 17]])
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rope_theta": 1e4,
    "head_dim": 32,
}


def name_of(grid: Any) -> str:
    return f"{grid.mode}-{grid.bits}-{grid.group_size}"


def logits_of(model: nn.Module) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    found: Any = tree_flatten(model.parameters())
    return dict(found)


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(module.weight) for path, module in plain_layers(model).items()}


def reopened(loaded: Loaded, folder: Path) -> Any:
    """The model as plain mlx-lm opens it."""
    models.save(folder, loaded)
    return mlx_lm.load(str(folder))[0]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def of_type(model_type: str, tokenizer: Any, **changes: Any) -> Loaded:
    """A tiny model of any type of mlx-lm's, with a tokenizer."""
    model, config = tiny(model_type, vocab_size=len(tokenizer), **changes)
    return Loaded(model, config, tokenizer)


# --- what is made -------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_plain_mlx_lm_opens_the_very_model(grid: Grid, tokenizer: Any, tmp_path: Path) -> None:
    """Bitwise the logits of the model in memory, every matrix rounded, and as many bits as it should have."""
    loaded = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)
    weights = sum(value.size for value in weights_of(loaded.model).values())
    beside = sum(value.size for value in arrays_of(loaded.model).values()) - weights
    small = quantized(loaded, grid)
    assert np.array_equal(logits_of(reopened(small, tmp_path)), logits_of(small.model))
    stored = {path: module for path, module in small.model.named_modules() if hasattr(module, "bits")}
    assert len(stored) == 8  # the embedding, which is the head too, and the seven matrices of the layer
    assert {name_of(module) for module in stored.values()} == {name_of(grid)}

    # By hand: `bits` for each weight, a group's scale and bias in float32 or its one byte, norms in float32.
    group = 64 if grid.mode == "affine" else 8
    by_hand = weights * (grid.bits + group / grid.group_size) + 32 * beside
    assert bits_per_weight(small.model) == pytest.approx(by_hand / (weights + beside), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS[:18], ids=name_of)
def test_values_are_the_nearest_of_the_grid(grid: Grid) -> None:
    """And the grid reaches from the end that is larger in magnitude to within a step of the other."""
    model = tiny_model(seed=3, **WIDE).model
    before = weights_of(model)
    plan = layer_grids(model, grid)
    nn.quantize(model, class_predicate=lambda path, _: plan.get(path, False))
    for path, module in [(path, module) for path, module in model.named_modules() if path in before]:
        values = mx.dequantize(module.weight, module.scales, module.biases, grid.group_size, grid.bits)
        was, now, scale, bias = (
            np.asarray(array, np.float64).reshape(-1, size)
            for array, size in (
                (before[path], grid.group_size),
                (values, grid.group_size),
                (module.scales, 1),
                (module.biases, 1),
            )
        )
        step, lost = np.abs(scale), np.abs(now - was)
        last = bias + (2**grid.bits - 1) * scale
        inside = (was >= np.minimum(bias, last)) & (was <= np.maximum(bias, last))
        assert (lost <= step * (0.5 + 1e-4))[inside].all()
        beyond = np.minimum(np.abs(was - bias), np.abs(was - last))
        assert np.allclose(lost[~inside], beyond[~inside], atol=1e-3 * step.max())
        assert (beyond[~inside] <= (step + 0 * was)[~inside] * 1.001).all()
        assert np.abs(bias).max(1) == pytest.approx(np.abs(was).max(1), rel=1e-6)
        assert not (lost <= step * 0.4).all()  # half a step is not claimed where less would do


def test_layers_may_have_widths_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    loaded = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)
    own = {"model.embed_tokens": 8, "model.layers.0.mlp.down_proj": 2, "model.layers.0.mlp.up_proj": 4}
    small = quantized(loaded, Grid(bits=4, group_size=32), own)
    again = reopened(small, tmp_path)
    assert np.array_equal(logits_of(again), logits_of(small.model))
    found = {path: module.bits for path, module in again.named_modules() if hasattr(module, "bits")}
    assert found == {**dict.fromkeys(plain_layers_of(tokenizer), 4), **own}
    told = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert told["quantization"] == told["quantization_config"]
    assert told["quantization"]["model.embed_tokens"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert "model.layers.0.mlp.up_proj" not in told["quantization"]
    assert "quantization" not in loaded.config

    fresh = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)
    with pytest.raises(KeyError, match=r"no layer model\.layer\.0 to be stored in 3 bits"):
        quantized(fresh, Grid(group_size=32), {"model.layer.0": 3})


def plain_layers_of(tokenizer: Any) -> list[str]:
    return list(plain_layers(models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, 1).model))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_config_is_the_one_that_mlx_lm_writes(model_type: str, tokenizer: Any) -> None:
    from mlx_lm.utils import quantize_model

    changes = MOE if model_type == "qwen3_moe" else {}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, **changes}
    mine = quantized(of_type(model_type, tokenizer, **sizes), Grid(bits=3, group_size=32))
    other = of_type(model_type, tokenizer, **sizes)
    _, theirs = quantize_model(other.model, other.config, 32, 3)
    if model_type == "llama":
        assert mine.config == theirs
    for path, how in theirs["quantization"].items():  # theirs leaves the mode of routers out
        if isinstance(how, dict):
            assert mine.config["quantization"][path] == {**how, "mode": "affine"}
    assert np.array_equal(logits_of(mine.model), logits_of(other.model))


@pytest.mark.parametrize(
    ("hidden", "grid", "router"),
    [
        (128, Grid(bits=4, group_size=64), ("affine", 8, 64)),
        (96, Grid(bits=4, group_size=32), ("affine", 8, 32)),  # groups of 64 do not divide it
        (48, Grid.model_validate({"mode": "nvfp4"}), None),  # nor do those of 32: it stays as it is
    ],
)
def test_a_router_has_a_grid_of_its_own(
    hidden: int, grid: Grid, router: Any, tokenizer: Any, tmp_path: Path
) -> None:
    loaded = of_type("qwen3_moe", tokenizer, hidden_size=hidden, intermediate_size=64, **MOE)
    small = quantized(loaded, grid)
    again = reopened(small, tmp_path)
    assert np.array_equal(logits_of(again), logits_of(small.model))
    gate: Any = dict(again.named_modules())["model.layers.0.mlp.gate"]
    assert router == (None if not hasattr(gate, "bits") else (gate.mode, gate.bits, gate.group_size))
    experts: Any = dict(again.named_modules())["model.layers.1.mlp.switch_mlp.down_proj"]
    assert name_of(experts) == name_of(grid)


# --- dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "type_of"),
    [
        (None, 6, mx.float32),
        ("float32", 6, mx.float32),
        ("float16", 5, mx.float16),
        ("bfloat16", 5, mx.bfloat16),
    ],
)
def test_dtype_is_that_of_all_beside_the_rounded_weights(
    dtype: str | None, bits: int, type_of: mx.Dtype, tokenizer: Any, tmp_path: Path
) -> None:
    """Four bits in groups of 32 are six with scales and biases in float32, and five in half of it."""
    loaded = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)
    told = {"dtype": "float32", "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    small = quantized(
        loaded._replace(config={**loaded.config, **told}), Grid(bits=4, group_size=32), None, dtype
    )
    again = reopened(small, tmp_path)
    assert np.array_equal(logits_of(again), logits_of(small.model))
    types = {value.dtype for value in arrays_of(again).values()}
    assert types == {mx.uint32, type_of}
    assert bits_per_weight(again) == pytest.approx(bits, abs=0.15)  # the norms are few
    said = dtype or "float32"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["dtype"], config["torch_dtype"], config["text_config"]) == (said, said, {"dtype": said})


def test_float16_ends_where_it_ends() -> None:
    loaded = tiny_model()
    norm: Any = loaded.model["model"].norm
    norm.weight = mx.full((32,), 7e4)
    with pytest.raises(
        ModelError, match=r"dtype` float16: model\.norm\.weight holds 70000.*65504; use bfloat16"
    ):
        cast(loaded, "float16")
    assert arrays_of(loaded.model)["model.norm.weight"].dtype == mx.float32
    cast(loaded, "bfloat16")
    norm.weight = mx.full((32,), mx.nan)
    with pytest.raises(ModelError, match="holds nan"):
        cast(loaded, "float16")


def test_what_a_model_type_keeps_in_its_own_type_is_not_cast() -> None:
    loaded = tiny_model()
    object.__setattr__(loaded.model, "cast_predicate", lambda path: "norm" not in path)
    cast(loaded, "bfloat16")
    types = {path: value.dtype for path, value in arrays_of(loaded.model).items()}
    assert {t for path, t in types.items() if "norm" in path} == {mx.float32}
    assert {t for path, t in types.items() if "norm" not in path} == {mx.bfloat16}


def test_bits_per_weight_are_measured(tokenizer: Any) -> None:
    loaded = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)

    def told(loaded: Loaded) -> dict[str, Any]:
        asked = Evaluate(tasks=[])
        none = {"teacher": lambda: None, "folder": None}
        return measure("x", lambda: loaded, TestSet([], [], 0), asked, 64, **none).metrics

    assert "bits_per_weight" not in told(loaded)
    small = quantized(loaded, Grid(bits=4, group_size=32), None, "float16")
    assert told(small)["bits_per_weight"] == bits_per_weight(small.model)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "grid", "message"),
    [
        (
            {"a.weight": (8, 128), "b.weight": (8, 96), "c.weight": (8, 80)},
            Grid(group_size=64),
            r"`quantize.group_size`: 64 does not divide the 96 columns of b; mode nvfp4 would",
        ),
        (
            {"a.weight": (8, 64), "b.weight": (4, 8, 192)},
            Grid(group_size=128),
            "does not divide the 64 columns of a; 32 or 64 or mode mxfp4 or mode mxfp8 or mode nvfp4 would",
        ),
        ({"a.weight": (8, 40)}, Grid(group_size=32), "40 columns of a, and no other divides all layers"),
        (
            {"a.weight": (8, 48)},
            Grid.model_validate({"mode": "mxfp4"}),
            r"`quantize.mode` mxfp4: its group size 32 does not divide the 48 columns of a; mode nvfp4 would",
        ),
    ],
)
def test_groups_that_do_not_divide_a_layer_are_refused(shapes: Any, grid: Grid, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_groups(shapes, grid, "quantize")


def test_what_is_never_rounded_may_have_any_width() -> None:
    shapes = {"norm.weight": (80,), "conv.weight": (64, 1, 4), "a.bias": (3, 5), "b.weight": (8, 128)}
    check_groups({**shapes, "vision_tower.x.weight": (8, 12)}, Grid(group_size=128), "quantize")


@pytest.mark.parametrize("grid", [Grid(group_size=size) for size in (32, 64, 128)], ids=name_of)
def test_the_check_says_what_rounding_does(grid: Grid, tokenizer: Any) -> None:
    """Of a new student the recipe tells it, of a loaded one the files, and both what happens in the end."""
    for hidden, wide, heads in [
        (64, 96, 2),
        (96, 64, 3),
        (128, 64, 4),
        (64, 128, 2),
        (128, 256, 2),
        (160, 160, 5),
    ]:
        shape: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_attention_heads": heads,
        }
        shape |= {"num_hidden_layers": 1, "model_type": "llama"}
        loaded = models.build(Shape(**shape), tokenizer, seed=1)
        fits = all(width % grid.group_size == 0 for width in (hidden, wide))
        section: dict[str, Any] = {"quantize": {"group_size": grid.group_size}}
        if fits:
            tiny_recipe(student={"shape": shape}, **section)
            assert len(layer_grids(loaded.model, grid)) == 8
            continue
        with pytest.raises(RecipeError, match="does not divide") as first:
            tiny_recipe(student={"shape": shape}, **section)
        with pytest.raises(RecipeError, match="does not divide") as last:
            quantized(loaded, grid)
        assert str(first.value).removeprefix("recipe: ") == str(last.value)


def test_a_loaded_student_is_checked_by_its_files(tokenizer: Any, tmp_path: Path) -> None:
    loaded = models.build(
        Shape(**{**WIDE, "intermediate_size": 96}, num_attention_heads=2), tokenizer, seed=1
    )
    models.save(tmp_path / "wide", loaded)
    student = {"shape": None, "model": "x"}

    def check(**quantize: Any) -> None:
        recipe = tiny_recipe(student=student, quantize=quantize or None)
        check_loaded_student(recipe, {"student": tmp_path / "wide"})

    with pytest.raises(RecipeError, match=r"64 does not divide the 96 columns of .*down_proj; 32 or mode"):
        check(group_size=64)
    check(group_size=32)
    check()
    models.save(tmp_path / "wide", quantized(loaded, Grid(group_size=32)))
    with pytest.raises(RecipeError, match=r"quantized already \(.*scales\).*set `quantize` to null"):
        check(group_size=32)
    check()
    check_loaded_student(tiny_recipe(student=student, quantize={"bits": 4}), {})  # not here yet


def test_preflight_asks_before_it_reads_data(tokenizer: Any, tmp_path: Path) -> None:
    from mlx_distill.preflight import prepare

    loaded = models.build(
        Shape(**{**WIDE, "intermediate_size": 96}, num_attention_heads=2), tokenizer, seed=1
    )
    models.save(tmp_path / "m", loaded)
    student = {"shape": None, "model": str(tmp_path / "m")}
    data = {"train": {"source": "not there.jsonl"}}
    recipe = tiny_recipe(student=student, data=data, quantize={"group_size": 64})
    with pytest.raises(RecipeError, match="does not divide"):
        prepare(recipe)


def test_awq_knows_some_types_only() -> None:
    awq = Quantize(method="awq")
    for config in ({"model_type": "llama"}, {"model_type": "deepseek_v2"}):
        check_type(awq, config)
    with pytest.raises(
        RecipeError, match=r"awq: mlx-lm has it for deepseek_v2, .*not for model type phi3; use gptq"
    ):
        check_type(awq, {"model_type": "phi3"})
    with pytest.raises(RecipeError, match="not for model type deepseek_v2 with `q_lora_rank`"):
        check_type(awq, {"model_type": "deepseek_v2", "q_lora_rank": 512})
    check_type(Quantize(method="gptq"), {"model_type": "phi3"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq", "bits": 3}, "gptq has 2, 4 and 8 bits; got `bits` 3"),
        ({"method": "gptq", "bits": [4, 6]}, "got `bits` 6"),
        ({"method": "awq", "mode": "mxfp4"}, "mode mxfp4 has no biases"),
        ({"method": "dwq", "mode": "nvfp4"}, "mode nvfp4 has no biases"),
        ({"mode": "mxfp4", "bits": [4, 8]}, "mode mxfp4 has 4 bits and groups of 32; leave"),
        ({"mode": "mxfp8", "group_size": 64}, "mode mxfp8 has 8 bits and groups of 32; leave"),
        ({"group_size": 16}, "mode affine has groups of 32, 64 or 128"),
        ({"bits": []}, "at least one width"),
        ({"gib": 1.0}, "`gib` is a size for layers of several widths; set `mixed`"),
        ({"gib": 1.0, "mixed": [2, 4], "bits": [2, 4]}, r"`gib` 1 takes the place of `bits` \[2, 4\]"),
        ({"method": "awq", "mixed": [2, 8]}, "awq has one width for all layers; drop `mixed`"),
        ({"mode": "mxfp4", "mixed": [2, 8]}, "mode mxfp4 has one"),
        ({"mixed": [2]}, "two widths or more"),
        ({"mixed": [2, 2, 8]}, "each once"),
        ({"mixed": [4, 8]}, "needs widths below and above `bits` 4"),
        ({"mixed": [2, 6], "bits": [3, 8]}, "needs widths below and above `bits` 8"),
        ({"steps": 10}, "`steps` 10 is for method dwq and qad, not rtn"),
        (
            {"method": "awq", "learning_rate": 1e-4},
            "`learning_rate` 0.0001 is for method dwq and qad, not awq",
        ),
        ({"method": "gptq", "temperature": 2.0}, "`temperature` 2.0 is for method dwq and qad, not gptq"),
        ({"towards": "student"}, "`towards` student is for method"),
        ({"method": "dwq", "rank": 8}, "`rank` 8 is for method qad, not dwq"),
        ({"method": "dwq", "rows": 9}, "`rows` 9 is for method awq and gptq and `mixed`, not dwq"),
    ],
)
def test_options_that_cannot_be_heeded_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        tiny_recipe(student={"shape": {**WIDE, "num_attention_heads": 2}}, quantize=options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dwq", "bits": [2, 3, 4, 8], "steps": 5, "learning_rate": 1e-4, "temperature": 2.0},
        {"method": "qad", "mode": "mxfp4", "rank": 8, "towards": "student"},
        {"method": "qad", "mixed": [2, 4, 8], "rows": 9},
        {"mixed": [2, 4, 8], "gib": 0.5},
        {"method": "awq", "bits": 3, "rows": 9},
        {"method": "gptq", "bits": [2, 4, 8], "dtype": "float16"},
    ],
)
def test_what_can_be_heeded_is_read_back_from_a_resolved_recipe(
    options: dict[str, Any], tmp_path: Path
) -> None:
    from mlx_distill.recipe import dump, load

    asked = tiny_recipe(student={"shape": {**WIDE, "num_attention_heads": 2}}, quantize=options)
    (tmp_path / "recipe.yaml").write_text(dump(asked), encoding="utf-8")
    assert load(tmp_path / "recipe.yaml") == asked


def test_a_level_for_each_width() -> None:
    assert levels(None) == []
    found = levels(Quantize(bits=[4, 2, 4], group_size=32))
    assert [(level.name, level.grid.bits) for level in found] == [("student-4bit", 4), ("student-2bit", 2)]
    assert [level.name for level in levels(Quantize.model_validate({"mode": "nvfp4"}))] == ["student-nvfp4"]
    assert [level.name for level in levels(Quantize(mixed=[2, 8], gib=1.0))] == ["student-mixed"]


# --- the stage ----------------------------------------------------------------------------------


class Kept:
    """As much of a run as the stage takes: a saved student, and what is saved beside it."""

    def __init__(self, folder: Path, loaded: Loaded, **quantize: Any):
        shape = {**WIDE, "num_attention_heads": 2}
        self.recipe = tiny_recipe(student={"shape": shape}, quantize={"group_size": 32, **quantize})
        self.run, self.saved, self.interrupts = self, dict[str, Loaded](), Interrupts()
        vocabulary = len(loaded.tokenizer)
        self.progress, self.prepared = silent, SimpleNamespace(vocabulary=vocabulary, prompts=[], valid=[])
        self.folder, self.said = folder, list[str]()
        self.console = SimpleNamespace(say=self.said.append)
        models.save(self.model("student"), loaded)

    def model(self, name: str) -> Path:
        return self.folder / name

    def save(self, name: str, loaded: Loaded) -> None:
        self.saved[name] = loaded
        models.save(self.model(name), loaded)


@pytest.fixture
def stage_of(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    rows = rows_of([5, 9, 3, 7, 40], vocabulary=len(tokenizer))
    monkeypatch.setattr(stage, "lessons", lambda work: SimpleNamespace(encoded=rows))

    def make(**quantize: Any) -> tuple[Kept, dict[str, Any]]:
        loaded = models.build(Shape(**WIDE, num_attention_heads=2), tokenizer, seed=1)
        work: Any = Kept(tmp_path, loaded, **quantize)
        return work, stage.quantize_student(work)

    return make


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_the_stage_makes_a_model_of_each_width(method: str, stage_of: Any) -> None:
    dtype = "float16" if method == "rtn" else None  # half precision is slow on the CPU
    work, said = stage_of(method=method, bits=[4, 8], dtype=dtype)
    assert said["models"] == ["student-4bit", "student-8bit"] == list(work.saved)
    assert json.loads(json.dumps(said)) == said
    for name, bits in zip(said["models"], (4, 8), strict=True):
        assert said["measured"][name]["bits_per_weight"] == pytest.approx(
            bits + (2 if dtype is None else 1), abs=0.15
        )
        again: Any = mlx_lm.load(str(work.model(name)))[0]
        assert np.array_equal(logits_of(again), logits_of(work.saved[name].model))
    student: Any = mlx_lm.load(str(work.model("student")))[0]
    lost = [np.abs(logits_of(work.saved[name].model) - logits_of(student)).mean() for name in said["models"]]
    assert lost[1] < lost[0] / 4


@pytest.mark.parametrize("worse", [False, True])
def test_what_mlx_lm_makes_is_kept_only_where_it_is_nearer(
    worse: bool, stage_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(loaded: Loaded, level: Any, tokens: Any) -> Loaded:
        """As good as 8 bits, or as bad as 2, in a model of 4."""
        bits = 2 if worse else 8
        return quantized(loaded, level.grid.model_copy(update={"bits": bits}))

    monkeypatch.setattr(stage, "gptq_quantized", made)
    work, said = stage_of(method="gptq", bits=4)
    told, kept = said["measured"]["student-4bit"], work.saved["student-4bit"].config["quantization"]["bits"]
    assert told["kept"] == (told["after_kl"] < told["before_kl"]) == (not worse)
    assert kept == (4 if worse else 8), "what is saved is the nearer one"
    assert ("rounded model is kept" in work.said[-1]) == worse


def test_the_stage_measures_layers_once_for_all_budgets(
    stage_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def counting(loaded: Loaded, options: Quantize, rows: Any, *rest: Any, **more: Any) -> Any:
        measured.append(rows)
        return layer_harms(loaded, options, rows, *rest, **more)

    monkeypatch.setattr(stage, "layer_harms", counting)
    work, said = stage_of(mixed=[2, 4, 8], bits=[3, 4], rows=4)
    assert [len(rows) for rows in measured] == [4]
    for name in said["models"]:
        told = said["measured"][name]
        assert told["bytes"] <= told["budget"] and told["kl_mixed"] > 0 < told["kl_uniform"]
        assert sum(value.nbytes for value in arrays_of(work.saved[name].model).values()) == told["bytes"]


def test_learned_methods_are_handed_the_level_and_the_bits(
    stage_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []

    def learned_quantized(work: Any, level: Any, bits: Any) -> tuple[Loaded, dict[str, Any]]:
        handed.append((level.name, bits))
        student = models.load(str(work.run.model("student")), "x")
        return quantized(student, level.grid, bits), {"kl_before": 1.0}

    monkeypatch.setitem(
        sys.modules, "mlx_distill.quantize.learned", SimpleNamespace(learned_quantized=learned_quantized)
    )
    _, said = stage_of(method="dwq", bits=3)
    assert handed == [("student-3bit", None)]
    assert said["measured"]["student-3bit"]["kl_before"] == 1.0
    _, said = stage_of(method="qad", bits=3, mixed=[2, 4])
    assert (
        set(handed[1][1].values()) <= {2, 3, 4}
        and {"widths", "kl_before"} <= said["measured"]["student-3bit"].keys()
    )


def test_rows_to_measure_on_are_drawn_by_the_seed(stage_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, _ = stage_of()
    all_rows = stage.lessons(work).encoded
    drawn = stage.calibration_rows(work, 3)
    assert drawn == stage.calibration_rows(work, 3) and len(drawn) == 3
    assert sorted(map(all_rows.index, drawn)) == list(map(all_rows.index, drawn))
    assert stage.calibration_rows(work, 100) == all_rows
    # Where nobody has answered yet, the questions are what there is.
    monkeypatch.setattr(stage, "lessons", lambda work: SimpleNamespace(encoded=[]))
    work.prepared.prompts = [SimpleNamespace(tokens=[4, 5, 6]), SimpleNamespace(tokens=[7])]
    assert stage.calibration_rows(work, 3) == [Encoded([4, 5, 6], 1)]
