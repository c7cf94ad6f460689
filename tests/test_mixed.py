"""Mixed precision: the budget, what is measured, and that no better allocation is overlooked."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import Ids, rows_of, tiny_model

from mlx_distill import models
from mlx_distill.errors import RecipeError
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize, Shape
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.mixed import (
    allocated,
    layer_bytes,
    layer_harms,
    least_harm,
    other_bytes,
    whole_harms,
)
from mlx_distill.quantize.rounding import plain_layers, quantized
from mlx_distill.teacher import LiveTeacher

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ROWS = rows_of([5, 9, 3, 7])
WIDTHS = [2, 4, 8]


def model(**shape: Any) -> Loaded:
    return models.build(Shape(**{**SHAPE, **shape}), Ids(50), 1)


def level_of(**options: Any) -> Level:
    return levels(Quantize.model_validate({"group_size": 32, "mixed": WIDTHS, **options}))[0]


def bytes_of(loaded: Loaded) -> int:
    parameters: Any = tree_flatten(loaded.model.parameters())
    return sum(value.nbytes for _, value in parameters)


# --- the choice ---------------------------------------------------------------------------------


def brute_force(harms: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The least sum of harms among all choices within the budget."""
    layers, choices = harms.shape
    best = np.inf
    for choice in itertools.product(range(choices), repeat=layers):
        if sizes[range(layers), choice].sum() <= budget:
            best = min(best, harms[range(layers), choice].sum())
    return best


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_is_better(seed: int) -> None:
    """Equal to trying all, at every budget; never over it; and the more it is, the less is lost."""
    random = np.random.default_rng(seed)
    harms = random.exponential(size=(3, 4)) * 10.0 ** random.integers(-4, 1, (3, 1))
    sizes = random.integers(1, 20, (3, 1)) * np.array([2, 3, 4, 8])
    lost = []
    for budget in range(int(sizes.min(1).sum()), int(sizes.max(1).sum()) + 2):
        chosen = least_harm(harms.tolist(), sizes.tolist(), budget)
        assert sizes[range(3), chosen].sum() <= budget
        lost.append(harms[range(3), chosen].sum())
        assert lost[-1] == pytest.approx(brute_force(harms, sizes, budget), rel=1e-12)
    assert (np.diff(lost) <= 0).all()

    # The usual mistake, to give bits to whom harms most, whatever they cost, must not pass.
    greedy = []
    for budget in range(int(sizes.min(1).sum()), int(sizes.max(1).sum()) + 2):
        chosen = [0, 0, 0]
        for layer in harms[:, 0].argsort()[::-1]:
            for place in range(4):
                trial = [*chosen[:layer], place, *chosen[layer + 1 :]]
                if sizes[range(3), trial].sum() <= budget:
                    chosen = trial
        greedy.append(harms[range(3), chosen].sum())
    assert max(np.array(greedy) - lost) > 0


def test_a_budget_of_many_units_is_kept() -> None:
    """Sizes without a common unit, and far more of them than the table has columns."""
    random = np.random.default_rng(0)
    harms = random.exponential(size=(40, 3))
    sizes = random.integers(10**7, 10**8, (40, 1)) * np.array([2, 4, 8]) + random.integers(0, 9, (40, 3))
    harms.sort(1)
    harms = harms[:, ::-1]  # more bits, less harm: with a few bytes too few, all would like to have the most
    for share in (0.0, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0):
        low, high = int(sizes[:, 0].sum()), int(sizes[:, 2].sum())
        budget = low + int(share * (high - low))
        chosen = least_harm(harms.tolist(), sizes.tolist(), budget)
        spent = sizes[range(40), chosen].sum()
        assert spent <= budget
        if share == 0:
            assert chosen == [0] * 40


# --- what is measured ---------------------------------------------------------------------------


def test_harms_are_the_kl_of_the_model_with_one_layer_rounded() -> None:
    """As `fidelity` measures it, of a copy with that layer rounded; and the model is as it was."""
    loaded, options = model(), level_of().options
    before = {path: np.array(value) for path, value in tree_flatten(loaded.model.parameters())}
    harms = layer_harms(loaded, options, ROWS, 50)
    assert list(harms) == list(plain_layers(loaded.model))
    after = {path: np.array(value) for path, value in tree_flatten(loaded.model.parameters())}
    assert all(np.array_equal(before[path], after[path]) for path in before | after)
    for path in ("model.embed_tokens", "model.layers.0.mlp.down_proj"):
        for bits in WIDTHS:
            other = model()
            module = plain_layers(other.model)[path]
            module.weight = mx.dequantize(*mx.quantize(module.weight, 32, bits), 32, bits)
            kl = fidelity(other.model, ROWS, 50, teacher=LiveTeacher(model(), 50))[0]["kl"]
            assert harms[path][bits] == pytest.approx(kl, rel=1e-3, abs=1e-8)
    assert all(harm[2] > harm[4] > harm[8] > 0 for harm in harms.values())


def test_the_whole_harm_is_that_of_the_quantized_model() -> None:
    """Of matrices put in the place of quantized ones; and all at once they harm what each does, nearly."""
    loaded, options = model(), level_of().options
    bits = {path: 8 if "mlp" in path else 4 for path in plain_layers(loaded.model)}
    [measured] = whole_harms(loaded, options, [bits], ROWS, 50)
    small = quantized(model(), level_of().grid, bits)
    kl = fidelity(small.model, ROWS, 50, teacher=LiveTeacher(model(), 50))[0]["kl"]
    assert measured == pytest.approx(kl, rel=1e-3)
    harms = layer_harms(loaded, options, ROWS, 50)
    assert measured == pytest.approx(sum(harms[path][width] for path, width in bits.items()), rel=0.5)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_model_that_is_made(dtype: str | None, tied: bool) -> None:
    options = level_of(dtype=dtype).options
    loaded = model(tie_word_embeddings=tied)
    sizes, rest = layer_bytes(loaded.model, options), other_bytes(loaded.model, options)
    bits = {path: WIDTHS[place % 3] for place, path in enumerate(sizes)}
    assert len(bits) == (8 if tied else 9)
    promised = rest + sum(sizes[path][width] for path, width in bits.items())
    assert bytes_of(quantized(loaded, level_of().grid, bits, dtype)) == promised


# --- both together ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_mixed_is_no_larger_and_no_worse_than_one_width(bits: int) -> None:
    level = level_of(bits=bits, mixed=[2, 3, 4, 5, 6, 8])
    found, told = allocated(model(), level, ROWS, 50)
    made, plain = quantized(model(), level.grid, found), quantized(model(), level.grid)
    assert bytes_of(made) == told["bytes"] <= bytes_of(plain) == told["budget"]
    kl, uniform = (
        fidelity(one.model, ROWS, 50, teacher=LiveTeacher(model(), 50))[0]["kl"] for one in (made, plain)
    )
    assert uniform == pytest.approx(told["kl_uniform"], rel=1e-3)
    assert kl == pytest.approx(min(told["kl_mixed"], told["kl_uniform"]), rel=1e-3)
    assert told["kept"] == ("mixed" if told["kl_mixed"] < told["kl_uniform"] else "uniform")
    assert told["bits_uniform"] == bits


def test_a_layer_that_harms_nothing_gets_the_fewest_bits() -> None:
    """The weights of one layer are such that it gives nothing: its output is multiplied by zero."""
    loaded = model(num_hidden_layers=2)
    last: Any = loaded.model["model"].layers[1]
    last.mlp.down_proj.weight = mx.zeros_like(last.mlp.down_proj.weight)
    found, _ = allocated(loaded, level_of(), ROWS, 50)
    dead = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    assert {found[path] for path in dead} == {2}
    assert max(found.values()) == 8


def test_where_mixed_is_worse_all_layers_have_one_width() -> None:
    """The harms say the wrong thing, and so the whole model is what decides."""
    loaded, level = model(), level_of()
    harms = layer_harms(loaded, level.options, ROWS, 50)
    wrong = {path: {2: harm[8], 4: harm[4], 8: harm[2]} for path, harm in harms.items()}
    found, told = allocated(loaded, level, ROWS, 50, harms=wrong)
    assert told["kept"] == "uniform" and set(found.values()) == {4}
    assert told["kl_mixed"] > told["kl_uniform"]


def test_gib_is_the_size_of_all_weights() -> None:
    full = bytes_of(quantized(model(), level_of().grid))
    for share in (0.7, 1.0, 1.3):
        level = level_of(gib=share * full / 2**30)
        found, told = allocated(model(), level, ROWS, 50)
        size = bytes_of(quantized(model(), level.grid, found))
        assert size == told["bytes"] <= told["budget"] <= share * full
        assert told["bits_uniform"] == {0.7: 2, 1.0: 4, 1.3: 5}[share]
    with pytest.raises(RecipeError, match=r"gib` 1e-06: at 2 bits, the fewest .* take \S+ GiB; raise it"):
        allocated(model(), level_of(gib=1e-6), ROWS, 50)


def test_rows_of_a_few_batches_are_weighed_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, options = tiny_model(), level_of().options
    whole = layer_harms(loaded, options, ROWS, 50)
    monkeypatch.setattr("mlx_distill.quantize.mixed.LOGITS", 50)  # a row a batch
    parts = layer_harms(loaded, options, ROWS, 50)
    for path, harm in whole.items():
        assert parts[path] == pytest.approx(harm, rel=1e-3, abs=1e-6)
