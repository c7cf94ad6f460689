"""Feature losses against their definition in NumPy float64, and their gradients against finite differences.

Each law also shows the usual mistake failing it, by the very measure that the right version passes. One
long file, since the definitions and the table of layers serve all of it.
"""

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlx_distill.losses.attention_scores import attention_scores, visible_keys
from mlx_distill.losses.features import (
    attention_relations,
    attention_transfer,
    balanced_weight,
    hidden_cosine,
    hidden_mse,
    make_projections,
    project,
)
from mlx_distill.losses.relations import check_relation_heads, relation_heads
from mlx_distill.models.taps import Attention

B, T = 2, 5
CAUSAL = np.tril(np.ones((T, T), bool))
WINDOW = CAUSAL & ~np.tril(np.ones((T, T), bool), -3)  # the last three
PADDED = np.stack([CAUSAL, CAUSAL & (np.arange(T) < 3)])[:, None]  # the second row has three tokens
BIAS = np.where(CAUSAL, -0.3 * np.abs(np.subtract.outer(np.arange(T), np.arange(T))), -np.inf)

Layer = dict[str, Any]  # float64 arrays, scale and mask of a layer's attention


def layer(seed, heads=4, key_heads=4, size=4, value_size=4, mask=None) -> Layer:
    random = np.random.default_rng(seed)
    return {
        "queries": random.normal(size=(B, heads, T, size)) * 2,
        "keys": random.normal(size=(B, key_heads, T, size)) * 2,
        "values": random.normal(size=(B, key_heads, T, value_size)) * 2,
        "scale": size**-0.5,
        "mask": mask,
    }


def as_attention(layer: Layer, dtype: mx.Dtype = mx.float32) -> Attention:
    arrays = {key: mx.array(layer[key]).astype(dtype) for key in ("queries", "keys", "values")}
    mask = layer["mask"]
    if mask is not None:
        mask = mx.array(mask) if mask.dtype == bool else mx.array(mask).astype(dtype)
    return Attention(**arrays, scale=layer["scale"], mask=mask)


def seen_by(layer: Layer) -> np.ndarray:
    mask = CAUSAL if layer["mask"] is None else layer["mask"]
    seen = mask if mask.dtype == bool else mask > -1e4
    if seen.ndim == 4:  # in every head
        seen = seen.all(1, keepdims=True)
    return np.broadcast_to(seen, (B, 1, T, T))


def numpy_scores(layer: Layer) -> np.ndarray:
    keys = np.repeat(layer["keys"], layer["queries"].shape[1] // layer["keys"].shape[1], axis=1)
    scores = layer["scale"] * layer["queries"] @ keys.swapaxes(-1, -2)
    mask = layer["mask"]
    return scores if mask is None or mask.dtype == bool else scores + np.where(mask > -1e4, mask, 0)


def softmax(scores, seen):
    """Zero at keys that are not seen, and everywhere in a row that sees none."""
    shares = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return shares / np.maximum(shares.sum(-1, keepdims=True), 1e-300)


def numpy_kl(p, q, seen):
    safe = seen & (p > 0)
    return np.where(safe, p * np.log(np.where(safe, p, 1) / np.where(safe, q, 1)), 0).sum(-1).mean(1)


def numpy_transfer(student: Layer, teacher: Layer) -> np.ndarray:
    seen = seen_by(student) & seen_by(teacher)
    p, q = softmax(numpy_scores(teacher), seen), softmax(numpy_scores(student), seen)
    if p.shape != q.shape:
        p, q = p.mean(1, keepdims=True), q.mean(1, keepdims=True)
    return numpy_kl(p, q, seen)


def numpy_transfer_scores(student: Layer, teacher: Layer) -> np.ndarray:
    seen = seen_by(student) & seen_by(teacher)
    ours, theirs = numpy_scores(student), numpy_scores(teacher)
    if ours.shape != theirs.shape:
        ours, theirs = ours.mean(1, keepdims=True), theirs.mean(1, keepdims=True)
    squares = np.where(seen, (ours - theirs) ** 2, 0)
    return (squares.sum(-1) / np.maximum(seen.sum(-1), 1)).mean(1)


def numpy_relations(
    student: Layer, teacher: Layer, heads, relations=("queries", "keys", "values"), root=True
):
    seen = seen_by(student) & seen_by(teacher)

    def relation(vectors):
        rows, length = vectors.shape[0], vectors.shape[2]
        # Head by head, side by side: the width of all heads, then cut into relation heads.
        wide = np.concatenate([vectors[:, h] for h in range(vectors.shape[1])], axis=-1)
        size = wide.shape[-1] // heads
        cut = np.stack([wide[..., i * size : (i + 1) * size] for i in range(heads)], axis=1)
        assert cut.shape == (rows, heads, length, size)
        return softmax(cut @ cut.swapaxes(-1, -2) / (size**0.5 if root else 1), seen)

    return np.mean([numpy_kl(relation(teacher[r]), relation(student[r]), seen) for r in relations], axis=0)


def close(found, expected) -> bool:
    """Relative error at most 1e-5 at every position; the mistakes below miss it."""
    found = np.array(found)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (B, T)
    return bool(np.allclose(found, expected, rtol=1e-5, atol=2e-7))


def slopes(definition, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Central differences of the sum of `definition(arrays)`, by each number in each array."""
    found = {name: np.zeros_like(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        for index in np.ndindex(array.shape):
            for h in (1e-5, -1e-5):
                moved = array.copy()
                moved[index] += h
                found[name][index] += definition({**arrays, name: moved}).sum() / (2 * h)
    return found


# Hidden states


@pytest.fixture
def hidden():
    random = np.random.default_rng(0)
    return random.normal(size=(B, T, 6)), 3 * random.normal(size=(B, T, 6))


def normal(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def numpy_cosine(student, teacher):
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / lengths


HIDDEN = [
    (hidden_mse, lambda s, t: ((s - t) ** 2).mean(-1), {}),
    (hidden_mse, lambda s, t: ((normal(s) - normal(t)) ** 2).mean(-1), {"normalize": True}),
    (hidden_cosine, numpy_cosine, {}),
]


def floats(*arrays):
    return [mx.array(array).astype(mx.float32) for array in arrays]


@pytest.mark.parametrize(("loss", "definition", "options"), HIDDEN)
def test_hidden_value_and_slope_are_those_of_the_definition(loss, definition, options, hidden):
    student, teacher = floats(*hidden)
    assert close(loss(student, teacher, **options), definition(*hidden))
    gradient = mx.grad(lambda s: loss(s, teacher, **options).sum())(student)
    slope = slopes(lambda a: definition(a["student"], hidden[1]), {"student": hidden[0]})["student"]
    assert np.abs(slope).max() > 0.1
    np.testing.assert_allclose(np.array(gradient), slope, atol=2e-6)


@pytest.mark.parametrize(("loss", "definition", "options"), HIDDEN)
def test_hidden_is_zero_at_equality_with_its_slope_and_teaches_no_teacher(loss, definition, options, hidden):
    student, teacher = floats(*hidden)
    assert float(mx.abs(loss(teacher, teacher, **options)).max()) == 0
    assert float(mx.abs(mx.grad(lambda s: loss(s, teacher, **options).sum())(teacher)).max()) == 0
    assert float(mx.abs(mx.grad(lambda t: loss(student, t, **options).sum())(teacher)).max()) == 0


@pytest.mark.parametrize(("loss", "definition", "options"), HIDDEN)
def test_hidden_of_nothing_has_a_finite_slope(loss, definition, options, hidden):
    teacher = floats(hidden[1])[0]
    gradient = mx.grad(lambda s: loss(s, teacher, **options).sum())(mx.zeros_like(teacher))
    assert bool(mx.isfinite(gradient).all())


def test_hidden_mse_is_a_mean_over_the_width_and_not_a_sum(hidden):
    found = hidden_mse(*floats(*hidden))
    assert not close(found, ((hidden[0] - hidden[1]) ** 2).sum(-1))
    assert not close(found, HIDDEN[1][1](*hidden))  # nor that of normalised states


def test_the_size_of_hidden_states_counts_only_where_it_should(hidden):
    student, teacher = floats(*hidden)
    larger = floats(7 * hidden[0])[0]
    for loss, definition, options in HIDDEN[1:]:
        assert close(loss(larger, teacher, **options), definition(*hidden))
    assert not close(hidden_mse(larger, teacher), HIDDEN[0][1](*hidden))
    # One rests on the other: the squared distance of unit states is 2 - 2 cosine.
    assert close(hidden_mse(student, teacher, normalize=True), 2 * numpy_cosine(*hidden))


def test_hidden_cosine_keeps_its_digits_near_equality(hidden):
    """1 - cosine in float32 has none left at a distance of 1e-7."""
    near = hidden[1] * (1 + 1e-4 * np.random.default_rng(1).normal(size=hidden[1].shape))
    student, teacher = floats(near, hidden[1])
    truth = numpy_cosine(np.array(student, np.float64), np.array(teacher, np.float64))
    assert truth.max() < 1e-7

    def error(found):
        return np.abs(np.array(found) / truth - 1).max()

    assert error(hidden_cosine(student, teacher)) < 1e-2
    lengths = mx.linalg.norm(student, axis=-1) * mx.linalg.norm(teacher, axis=-1)
    assert error(1 - (student * teacher).sum(-1) / lengths) > 1e-2


def test_hidden_states_of_different_width_need_a_projection(hidden):
    student, teacher = floats(*hidden)
    with pytest.raises(ValueError, match="4 wide in the student and 6 in the teacher; project"):
        hidden_mse(student[..., :4], teacher)


# Attention: values, slopes

LAYERS = {  # student, teacher
    "same heads": ({}, {}),
    "other head sizes": ({"size": 2, "value_size": 2}, {"size": 8, "value_size": 8}),
    "grouped keys": ({"key_heads": 2}, {"heads": 4, "key_heads": 1}),
    "other head counts": ({"heads": 2, "key_heads": 2}, {"heads": 6, "key_heads": 2}),
    "boolean window": ({"mask": WINDOW}, {"mask": WINDOW}),
    "window in the teacher alone": ({}, {"mask": WINDOW}),
    "boolean padding, a row that sees nothing": ({"mask": PADDED & (np.arange(T) > 0)}, {"mask": PADDED}),
    "added bias": ({"mask": BIAS}, {"mask": BIAS * 0.5}),
    "added lowest number of float16": ({"mask": np.where(CAUSAL, 0.0, -65504.0)}, {}),
}
LOSSES = {
    "distributions": (attention_transfer, numpy_transfer, {}),
    "scores": (attention_transfer, numpy_transfer_scores, {"on": "scores"}),
    "relations": (attention_relations, lambda s, t: numpy_relations(s, t, 2), {"heads": 2}),
    "values": (
        attention_relations,
        lambda s, t: numpy_relations(s, t, 4, ["values"]),
        {"heads": 4, "relations": ["values"]},
    ),
}


@pytest.fixture(params=LAYERS)
def both(request) -> tuple[Layer, Layer]:
    ours, theirs = LAYERS[request.param]
    return layer(1, **ours), layer(2, **theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_attention_value_is_its_definition(name, both):
    loss, definition, options = LOSSES[name]
    found = loss(as_attention(both[0]), as_attention(both[1]), **options)
    expected = definition(*both)
    assert expected.max() > 0.05
    assert close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_attention_slope_is_that_of_the_definition_and_the_teacher_has_none(name, both):
    loss, definition, options = LOSSES[name]
    student, teacher = as_attention(both[0]), as_attention(both[1])
    trains = {"queries", "keys", "values"} if loss is attention_relations else {"queries", "keys"}
    trains &= set(options.get("relations", trains))

    def by(arrays, side):
        if side == "student":
            return loss(student._replace(**arrays), teacher, **options).sum()
        return loss(student, teacher._replace(**arrays), **options).sum()

    gradients = mx.grad(by)({key: getattr(student, key) for key in trains}, "student")
    expected = slopes(lambda a: definition({**both[0], **a}, both[1]), {key: both[0][key] for key in trains})
    for key in trains:
        assert np.abs(expected[key]).max() > 0.01
        np.testing.assert_allclose(np.array(gradients[key]), expected[key], atol=5e-6, rtol=1e-4)

    none = mx.grad(by)({key: getattr(teacher, key) for key in trains}, "teacher")
    assert all(float(mx.abs(gradient).max()) == 0 for gradient in none.values())


@pytest.mark.parametrize("name", LOSSES)
def test_attention_is_zero_at_equality_with_its_slope(name, both):
    loss, _, options = LOSSES[name]
    student = as_attention(both[0])
    arrays = {key: getattr(student, key) for key in ("queries", "keys", "values")}
    assert float(mx.abs(loss(student, student, **options)).max()) == 0
    gradients = mx.grad(lambda a: loss(student._replace(**a), student, **options).sum())(arrays)
    assert max(float(mx.abs(gradient).max()) for gradient in gradients.values()) < 2e-6


def test_scores_in_an_added_mask_learn_too():
    """In multi-head latent attention the mask holds the rotary part of the scores."""
    student, teacher = layer(1), layer(2)
    bias = np.random.default_rng(3).normal(size=(B, 4, T, T)) + np.where(CAUSAL, 0, -65504.0)
    attention, other = as_attention(student), as_attention(teacher)
    gradient = mx.grad(lambda m: attention_transfer(attention._replace(mask=m), other).sum())(*floats(bias))
    expected = slopes(lambda a: numpy_transfer({**student, **a}, teacher), {"mask": bias})["mask"]
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(np.array(gradient), expected, atol=2e-6)
    assert bool((mx.where(mx.array(CAUSAL), 0.0, gradient) == 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_no_nan_from_rows_that_see_nothing(name):
    """Whole rows hidden, by False, by -inf and by the lowest number: values and slopes stay finite."""
    loss, _, options = LOSSES[name]
    nothing = np.zeros((T, T), bool)
    for mask in (nothing, np.where(nothing, 0, -np.inf), np.where(nothing, 0.0, -3e38)):
        student, teacher = as_attention(layer(1, mask=mask)), as_attention(layer(2, mask=mask))
        arrays = {key: getattr(student, key) for key in ("queries", "keys", "values")}
        value, gradients = mx.value_and_grad(
            lambda a, s=student, t=teacher: loss(s._replace(**a), t, **options).sum()
        )(arrays)
        assert float(value) == 0
        assert all(float(mx.abs(gradient).max()) == 0 for gradient in gradients.values())
    # The usual way, softmax of -inf, is not a number there.
    assert bool(mx.isnan(mx.softmax(attention_scores(student), axis=-1)).all())


# Laws, each with the usual mistake


def cut(layer: Layer, rows: slice, length: int) -> Layer:
    arrays = {key: layer[key][rows, :, :length] for key in ("queries", "keys", "values")}
    return {**layer, **arrays}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_on_the_right_and_other_rows_change_nothing(name):
    loss, _, options = LOSSES[name]
    student, teacher = layer(1), layer(2)
    for side in (student, teacher):
        for key in ("queries", "keys", "values"):
            side[key][:, :, 3:] *= 20  # whatever padding holds

    def of(rows, length, mask=None):
        ours, theirs = ({**cut(side, rows, length), "mask": mask} for side in (student, teacher))
        return np.array(loss(as_attention(ours), as_attention(theirs), **options))

    alone = of(slice(0, 1), 3)
    np.testing.assert_allclose(of(slice(0, 2), T)[:1, :3], alone, rtol=1e-5, atol=1e-6)
    # The usual mistake: rows of softmax, or means, over padding too.
    everything = np.ones((T, T), bool)
    assert np.abs(of(slice(0, 2), T, everything)[:1, :3] - alone).max() > 0.05


def test_the_usual_mistakes_in_attention_transfer_show():
    student, teacher = layer(1), layer(2)
    ours, theirs = as_attention(student), as_attention(teacher)
    found = attention_transfer(ours, theirs)
    seen = seen_by(student)
    p, q = softmax(numpy_scores(teacher), seen), softmax(numpy_scores(student), seen)
    assert close(found, numpy_kl(p, q, seen))
    assert not close(found, numpy_kl(q, p, seen))  # swapped
    assert not close(found, numpy_kl(p.mean(1, keepdims=True), q.mean(1, keepdims=True), seen))  # heads first
    everywhere = np.ones_like(seen)
    unmasked = (softmax(numpy_scores(side), everywhere) for side in (teacher, student))
    assert not close(found, numpy_kl(*unmasked, seen))  # masked behind the softmax, so rows lack mass
    unscaled = [{**side, "scale": 1.0} for side in (student, teacher)]
    assert not close(found, numpy_transfer(*unscaled))

    found = attention_transfer(ours, theirs, on="scores")
    squares = (numpy_scores(student) - numpy_scores(teacher)) ** 2
    assert not close(found, np.where(seen, squares, 0).mean(-1).mean(1))  # mean over hidden keys too
    assert not close(found, squares.mean(-1).mean(1))  # hidden keys counted


def test_the_usual_mistakes_in_relations_show():
    student, teacher = layer(1), layer(2)
    found = attention_relations(as_attention(student), as_attention(teacher), heads=2)
    assert close(found, numpy_relations(student, teacher, 2))
    assert not close(found, numpy_relations(teacher, student, 2))  # swapped
    assert not close(found, numpy_relations(student, teacher, 2, root=False))  # without 1 / sqrt(width)
    assert not close(found, numpy_relations(student, teacher, 4))  # other heads
    assert not close(found, 3 * numpy_relations(student, teacher, 2))  # a sum over relations
    transposed = [{**side, "queries": side["queries"].swapaxes(1, 3)} for side in (student, teacher)]
    mixed = [{**side, "queries": side["queries"].reshape(B, 4, T, 4, order="F")} for side in transposed]
    assert not close(found, numpy_relations(*mixed, 2))  # heads not side by side


def test_relations_know_no_heads_of_either_model():
    """The same vectors, cut into heads otherwise, relate alike; the loss of a rotated copy is zero too."""
    student = layer(1)
    wide = {key: student[key].swapaxes(1, 2).reshape(B, T, 16) for key in ("queries", "keys", "values")}
    recut = {key: array.reshape(B, T, 2, 8).swapaxes(1, 2) for key, array in wide.items()}
    ours, theirs = as_attention(student), as_attention({**student, **recut})
    assert float(mx.abs(attention_relations(ours, theirs, heads=4)).max()) < 1e-6
    # Attention itself does not: the same numbers in other heads attend otherwise.
    assert float(mx.abs(attention_transfer(ours, theirs)).max()) > 0.05


def test_a_constant_on_all_scores_counts_for_scores_alone():
    student = as_attention(layer(1))
    moved = student._replace(mask=mx.where(mx.array(CAUSAL), 2.0, -mx.inf))
    assert float(mx.abs(attention_transfer(moved, student)).max()) < 1e-6
    np.testing.assert_allclose(np.array(attention_transfer(moved, student, on="scores")), 4, rtol=1e-5)


def test_visible_keys_are_those_of_every_head():
    per_head = np.stack([CAUSAL, WINDOW, CAUSAL, CAUSAL])
    for mask in (per_head, per_head[None], np.where(per_head, 0.0, -1e9)):
        seen = visible_keys(as_attention(layer(1, mask=mask)))
        assert seen.shape == (1, 1, T, T)
        assert (np.array(seen) == WINDOW).all()
    assert (np.array(visible_keys(as_attention(layer(1)))) == CAUSAL).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    loss, definition, options = LOSSES[name]
    rounded = []
    for side in (layer(1), layer(2)):
        halves = as_attention(side, mx.bfloat16)
        exact = {k: np.array(getattr(halves, k).astype(mx.float32), np.float64) for k in halves._fields[:3]}
        rounded.append((halves, {**side, **exact}))
    (ours, exact_ours), (theirs, exact_theirs) = rounded
    assert close(loss(ours, theirs, **options), definition(exact_ours, exact_theirs))
    # Scores kept in bfloat16 would miss it.
    scores = ours.queries @ ours.keys.swapaxes(-1, -2) * ours.scale
    gap = mx.abs(scores.astype(mx.float32) - attention_scores(ours))
    assert float(mx.where(mx.array(CAUSAL), gap, 0.0).max()) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_and_checkpointed_give_the_same_numbers(name):
    loss, _, options = LOSSES[name]
    student, teacher = (as_attention(layer(seed, key_heads=2, mask=PADDED)) for seed in (1, 2))
    arrays = {key: getattr(student, key) for key in ("queries", "keys", "values")}
    other = {key: getattr(teacher, key) for key in ("queries", "keys", "values")}

    def total(mine, others):
        return loss(student._replace(**mine), teacher._replace(**others), **options).sum()

    plain = mx.value_and_grad(total)(arrays, other)
    for way in (mx.compile(mx.value_and_grad(total)), mx.value_and_grad(mx.checkpoint(total))):
        found = way(arrays, other)
        for (path, one), (_, two) in zip(tree_flatten(found), tree_flatten(plain), strict=True):
            np.testing.assert_allclose(np.array(one), np.array(two), atol=2e-6, err_msg=path)


# Relation heads


def test_relation_heads_are_the_most_that_divide_all_widths():
    assert relation_heads([896, 128, 128, 3584, 512, 512], most=14) == 8
    assert relation_heads([64, 64, 96], most=12) == 8
    assert relation_heads([7, 5], most=4) == 1
    assert relation_heads([12], most=100) == 12


def test_no_heads_given_means_as_many_as_fit():
    student, teacher = layer(1, heads=6, key_heads=2), layer(2, heads=4, key_heads=4)
    found = attention_relations(as_attention(student), as_attention(teacher))
    assert close(found, numpy_relations(student, teacher, 4))  # of widths 24, 8, 16; at most 6


def test_relation_heads_that_do_not_fit_are_refused_in_a_line():
    check_relation_heads(8, [896, 128], [3584, 512])
    with pytest.raises(ValueError, match="^6 relation heads cannot share the width 128 in the st") as error:
        check_relation_heads(6, [96, 128], [3584, 512])
    assert "take 4, or null" in str(error.value)
    assert "\n" not in str(error.value)
    check_relation_heads(4, [96, 128], [3584, 512])  # as it says
    with pytest.raises(ValueError, match="in the teacher"):
        attention_relations(as_attention(layer(1)), as_attention(layer(2, size=3)), heads=16)


def test_options_are_typed_for_a_recipe():
    """It checks each against the signature."""

    def valid(loss, option, value):
        annotation = inspect.signature(loss).parameters[option].annotation
        return TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value) == value

    assert valid(attention_transfer, "on", "scores")
    assert valid(attention_relations, "relations", ["keys"])
    assert valid(attention_relations, "heads", None)
    assert valid(hidden_mse, "normalize", True)
    for wrong in ((attention_transfer, "on", "score"), (attention_relations, "relations", [])):
        with pytest.raises(ValidationError):
            valid(*wrong)


# Balance and projections


def test_balanced_weight_makes_both_losses_count_alike():
    logits, feature = mx.array(2.0), mx.array(0.004)
    weight = balanced_weight(logits, feature)
    assert float(weight) == pytest.approx(500)
    assert float(weight * feature) == pytest.approx(2)
    assert float(balanced_weight(logits, mx.array(0.0))) == 0
    assert float(balanced_weight(mx.array(0.0), mx.array(0.0))) == 0
    assert balanced_weight(logits.astype(mx.bfloat16), feature).dtype == mx.float32


def test_balanced_weight_has_no_slope_of_its_own():
    """With one, weight * feature loss would be the loss on logits again, and teach no features."""

    def total(x, weigh):
        logits, feature = 3 * x, x**2
        return weigh(logits, feature) * feature

    x = mx.array(0.5)
    assert float(mx.grad(total)(x, balanced_weight)) == pytest.approx(1.5 / 0.25 * 2 * 0.5)
    assert float(mx.grad(total)(x, lambda a, b: a / b)) == pytest.approx(3)  # the slope of logits alone
    for nothing in (0.0, 1e-12):
        slope = mx.grad(lambda f: balanced_weight(mx.array(1.0), f) * f)(mx.array(nothing))
        assert float(slope) == 0


def test_projections_bring_hidden_states_to_the_teachers_width(hidden):
    pairs = [(1, 2), (2, 4)]
    mx.random.seed(3)
    projections = make_projections(pairs, 6, 4)
    assert isinstance(projections, nn.Module)
    shapes = {name: array.shape for name, array in tree_flatten(projections.trainable_parameters())}
    assert shapes == {"pairs.0.weight": (4, 6), "pairs.1.weight": (4, 6)}  # no bias
    student = floats(hidden[0])[0]
    weights = [np.array(one.weight, np.float64) for one in projections.pairs]
    for i in (0, 1):
        np.testing.assert_allclose(
            np.array(project(projections, i, student)), hidden[0] @ weights[i].T, atol=1e-5
        )
    # The usual mistake, the pair beside it, is another matrix.
    assert np.abs(np.array(project(projections, 1, student)) - hidden[0] @ weights[0].T).max() > 0.1


def test_projections_depend_on_the_seed_alone_and_on_nothing_where_widths_agree(hidden):
    made = []
    for seed in (3, 3, 4):
        mx.random.seed(seed)
        projections = make_projections([(1, 2)], 6, 4)
        assert projections is not None
        made.append(np.array(projections.pairs[0].weight))
    assert (made[0] == made[1]).all()
    assert not (made[0] == made[2]).all()
    assert make_projections([(1, 2)], 6, 6) is None
    student = floats(hidden[0])[0]
    assert project(None, 0, student) is student


def test_projections_learn_by_the_slope_of_the_definition(hidden):
    mx.random.seed(0)
    projections = make_projections([(1, 1), (2, 2)], 6, 3)
    assert projections is not None
    student, teacher = floats(hidden[0], hidden[1][..., :3])

    def total(parameters):
        projections.update(parameters)
        return hidden_mse(project(projections, 1, student), teacher).sum()

    gradient = mx.grad(total)(projections.trainable_parameters())
    weight = np.array(projections.pairs[1].weight, np.float64)
    slope = slopes(
        lambda a: ((hidden[0] @ a["weight"].T - hidden[1][..., :3]) ** 2).mean(-1), {"weight": weight}
    )["weight"]
    np.testing.assert_allclose(np.array(gradient["pairs"][1]["weight"]), slope, rtol=1e-4, atol=1e-5)
    assert float(mx.abs(gradient["pairs"][0]["weight"]).max()) == 0
