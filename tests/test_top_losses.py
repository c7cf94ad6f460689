"""Token losses on the teacher's top k and its tail, against the definitions of test_losses.py."""

import math

import mlx.core as mx
import numpy as np
import pytest
from test_losses import (
    DIVERGENCES,
    NAMES,
    B,
    T,
    V,
    as_mx,
    dense,
    divergence64,
    far,
    gradient,
    log_softmax64,
    own_options,
    scale_of,
    slope,
    value,
)

from mlx_distill.losses import LOSSES, NEEDS_TAIL, NEEDS_TEACHER, Targets, Top, top_masses, top_of

K = 3
MODES = {"tail": (K, True), "no tail": (K, False), "whole vocabulary": (V, True)}
each_divergence = pytest.mark.parametrize(("loss", "options"), DIVERGENCES)
each_mode = pytest.mark.parametrize("mode", MODES)
each_name = pytest.mark.parametrize("loss", NAMES)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return 2 * random.normal(size=(B, T, V)), 2 * random.normal(size=(B, T, V))


def likeliest(teacher: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-teacher, axis=-1)[..., :k]


def outcomes64(logits: np.ndarray, indices: np.ndarray, tail: bool) -> np.ndarray:
    """Log-probabilities of the tokens at `indices` and, as one more outcome, of all others."""
    log_p = log_softmax64(logits)
    kept = np.take_along_axis(log_p, indices, -1)
    if not tail or indices.shape[-1] == logits.shape[-1]:
        return kept
    rest = log_p.copy()
    np.put_along_axis(rest, indices, -np.inf, -1)
    return np.concatenate([kept, np.logaddexp.reduce(rest, -1, keepdims=True)], -1)


def top64(teacher: np.ndarray, mode: str, temperature: float) -> Targets:
    """Targets with a top at a temperature, made without the code under test."""
    k, tail = MODES[mode]
    indices = likeliest(teacher, k)
    found = outcomes64(teacher / temperature, indices, tail=k < V)
    log_tail = found[..., k:].sum(-1) if k < V else np.full(teacher.shape[:-1], -np.inf)
    top = Top(mx.array(indices.astype(np.int32)), as_mx(found[..., :k]), as_mx(log_tail) if tail else None)
    return Targets(mx.array(np.zeros(teacher.shape[:-1], np.int32)), top=top)


def on_top64(loss, student, teacher, mode, options, frozen=None) -> np.ndarray:
    """What a loss on a top must give, float64."""
    k, tail = MODES[mode]
    indices, temperature = likeliest(teacher, k), options.get("temperature", 1.0)
    log_p, log_q, kept = (
        outcomes64(x / temperature, indices, tail)
        for x in (teacher, student, student if frozen is None else frozen)
    )
    has_tail = tail and k < V
    nats = divergence64(loss, log_p, log_q, frozen=kept, tail=has_tail, **own_options(options))
    return scale_of(loss, options) * nats


@each_mode
@each_divergence
def test_value_is_its_definition(loss, options, mode, logits):
    student, teacher = logits
    temperature = options.get("temperature", 1.0)
    found = value(loss, student, top64(teacher, mode, temperature), options)
    wanted = on_top64(loss, student, teacher, mode, options)
    size = np.maximum(np.abs(wanted), 0.05)  # without a tail a sum may end near zero
    assert (np.abs(found - wanted) / size).max() < 1e-5

    # The usual mistakes do not pass: the other treatment of the tail, and a renormalised one.
    other = {"tail": "no tail", "no tail": "tail", "whole vocabulary": "tail"}[mode]
    assert np.abs(on_top64(loss, student, teacher, other, options) - wanted).max() > 1e-3
    if mode == "tail":
        indices = likeliest(teacher, K)
        log_p, log_q = (
            log_softmax64(np.take_along_axis(x, indices, -1) / temperature) for x in (teacher, student)
        )
        renormalised = scale_of(loss, options) * divergence64(loss, log_p, log_q, **own_options(options))
        assert far(renormalised, wanted) > 1e-2
    if temperature != 1 and loss != "total_variation":  # the teacher's values are at the temperature already
        targets = top64(teacher, mode, temperature)
        assert targets.top is not None
        twice = targets._replace(top=targets.top._replace(log_p=targets.top.log_p / temperature))
        assert far(value(loss, student, twice, options), wanted) > 1e-2


@each_mode
@each_divergence
def test_gradient_is_the_slope_of_the_definition(loss, options, mode, logits):
    student, teacher = logits
    found = gradient(loss, student, top64(teacher, mode, options.get("temperature", 1.0)), options)
    wanted = slope(lambda s: on_top64(loss, s, teacher, mode, options, frozen=student), student)
    assert np.abs(wanted).max() > 0.02
    rounding = 1e-5 if options.get("beta") == 0.001 else 2e-6
    np.testing.assert_allclose(found, wanted, atol=rounding * max(1, np.abs(wanted).max()))


@each_divergence
def test_zero_at_equality_and_no_slope_there(loss, options, logits):
    student, teacher = logits
    small = 1e-6 / (0.001 * 0.999) if options.get("beta") == 0.001 else 2e-6 if options else 1e-6
    targets = top64(student, "tail", options.get("temperature", 1.0))
    assert np.abs(value(loss, student + 4, targets, options)).max() < 1.5 * small
    if loss != "total_variation":  # which has a kink there
        assert np.abs(gradient(loss, student, targets, options)).max() < small
    assert np.abs(value(loss, teacher, targets, options)).max() > 1e-2


@each_divergence
def test_a_top_of_the_whole_vocabulary_is_dense(loss, options, logits):
    student, teacher = logits
    top = top_of(as_mx(teacher), V, options.get("temperature", 1.0))
    assert top.log_tail is None
    targets = Targets(mx.zeros((B, T), mx.int32), top=top)
    whole = dense(teacher)
    part = targets._replace(top=top_of(as_mx(teacher), K, options.get("temperature", 1.0)))
    rounding = 1e-5 if options.get("beta") == 0.001 else 2e-6
    for of in (value, gradient):
        wanted = of(loss, student, whole, options)
        near = rounding * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(of(loss, student, targets, options), wanted, atol=near)
        assert np.abs(of(loss, student, part, options) - wanted).max() > near


@each_name
def test_a_tail_of_one_token_is_that_token(loss, logits):
    student, teacher = logits
    targets = Targets(mx.zeros((B, T), mx.int32), top=top_of(as_mx(teacher), V - 1))
    np.testing.assert_allclose(
        value(loss, student, targets), value(loss, student, dense(teacher)), rtol=1e-5, atol=1e-6
    )


def test_the_gradient_off_the_support_only_sees_the_mass_of_the_tail(logits):
    """Of forward KL: q - p on the k, and q (1 - tail of p / tail of q) on each other token."""
    student, teacher = logits
    indices = likeliest(teacher, K)
    p, q = (np.exp(log_softmax64(x)) for x in (teacher, student))
    off = np.ones_like(p)
    np.put_along_axis(off, indices, 0, -1)
    ratio = (p * off).sum(-1, keepdims=True) / (q * off).sum(-1, keepdims=True)
    wanted = np.where(off == 1, q * (1 - ratio), q - p)
    np.testing.assert_allclose(
        gradient("forward_kl", student, top64(teacher, "tail", 1.0)), wanted, atol=2e-6
    )
    assert np.abs(wanted - (q - p)).max() > 0.01  # and so it is not the dense gradient


@each_divergence
def test_order_and_padding_change_nothing(loss, options, logits):
    student, teacher = logits
    targets = top64(teacher, "tail", options.get("temperature", 1.0))
    wanted = value(loss, student, targets, options)
    assert targets.top is not None
    indices, log_p, log_tail = targets.top
    turned = targets._replace(top=Top(indices[..., ::-1], log_p[..., ::-1], log_tail))
    np.testing.assert_allclose(value(loss, student, turned, options), wanted, rtol=2e-6, atol=1e-6)
    for low in (-np.inf, -1e4):
        padded = np.concatenate([student, np.full((B, T, 4), low)], -1)
        np.testing.assert_allclose(value(loss, padded, targets, options), wanted, rtol=2e-6, atol=1e-6)
        assert np.abs(gradient(loss, padded, targets, options)[..., V:]).max() == 0
    half_turned = targets._replace(top=Top(indices[..., ::-1], log_p, log_tail))
    assert np.abs(value(loss, student, half_turned, options) - wanted).max() > 1e-3


@each_divergence
def test_a_student_that_is_extremely_sure(loss, options, logits):
    """On one of the k, then on another token: either leaves nothing that float32 can hold for the rest."""
    student, teacher = logits
    for place in (0, V - 1):
        sure = student.copy()
        np.put_along_axis(sure, likeliest(teacher, V)[..., place : place + 1], 1e4, -1)
        targets = top64(teacher, "tail", options.get("temperature", 1.0))
        wanted = on_top64(loss, sure, teacher, "tail", options)
        np.testing.assert_allclose(value(loss, sure, targets, options), wanted, rtol=2e-5)
        assert np.isfinite(gradient(loss, sure, targets, options)).all()
    # Taken from one instead of summed up, the rest would have no logarithm.
    q = mx.softmax(as_mx(sure), -1)
    on_top = mx.take_along_axis(q, mx.array(likeliest(teacher, K)), -1).sum(-1)
    assert not np.isfinite(np.array(mx.log(1 - mx.where(on_top > 0.5, on_top, 1 - on_top)))).any()


@each_divergence
def test_a_teacher_or_student_without_a_tail_to_speak_of(loss, options, logits):
    student, teacher = logits
    only = np.full_like(teacher, -np.inf)
    np.put_along_axis(only, likeliest(teacher, K), np.take_along_axis(teacher, likeliest(teacher, K), -1), -1)
    top = top_of(as_mx(only), K, options.get("temperature", 1.0))
    targets = Targets(mx.zeros((B, T), mx.int32), top=top)
    for given in (student, only):
        assert np.isfinite(value(loss, given, targets, options)).all()
        assert np.isfinite(gradient(loss, given, targets, options)).all()
    assert np.abs(value(loss, only, targets, options)).max() < 2e-3  # the same distribution


@each_divergence
def test_a_token_of_the_top_that_both_rule_out(loss, options, logits):
    _, teacher = logits
    only = np.full_like(teacher, -np.inf)
    np.put_along_axis(only, likeliest(teacher, K), np.take_along_axis(teacher, likeliest(teacher, K), -1), -1)
    top = top_of(as_mx(only), K + 1, options.get("temperature", 1.0))
    for given in (top, top._replace(log_tail=None)):
        targets = Targets(mx.zeros((B, T), mx.int32), top=given)
        assert np.abs(value(loss, only, targets, options)).max() < 2e-3
        assert np.isfinite(gradient(loss, only, targets, options)).all()


def test_the_last_of_a_whole_vocabulary_is_no_tail(logits):
    """Though a tail is given, of no mass; the likeliest token stands last and belongs to the head."""
    student, teacher = logits
    indices = likeliest(teacher, V)[..., ::-1]
    log_p = outcomes64(teacher, indices, True)
    top = Top(mx.array(indices.astype(np.int32)), as_mx(log_p), mx.full((B, T), -mx.inf))
    found = value("adaptive_kl", student, Targets(mx.zeros((B, T), mx.int32), top=top))
    np.testing.assert_allclose(found, value("adaptive_kl", student, dense(teacher)), rtol=1e-5)


@each_divergence
def test_compiled_and_checkpointed_give_the_same_and_nothing_reaches_the_teacher(loss, options, logits):
    student, teacher = logits
    top = top_of(as_mx(teacher), K, options.get("temperature", 1.0))

    def total(s, indices, log_p, log_tail):
        targets = Targets(mx.zeros((B, T), mx.int32), top=Top(indices, log_p, log_tail))
        return LOSSES[loss](s, targets, **options).sum()

    given = (as_mx(student), *top)
    plain = mx.value_and_grad(total)(*given)
    for other in (mx.compile(mx.value_and_grad(total)), mx.value_and_grad(mx.checkpoint(total))):
        for found, wanted in zip(other(*given), plain, strict=True):
            np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-5, atol=1e-6)
    for reached in mx.grad(total, argnums=(2, 3))(*given):
        assert float(mx.abs(reached).max()) == 0


@each_divergence
def test_value_over_a_real_vocabulary(loss, options):
    """151,936 tokens, the teacher's 64 likeliest."""
    random = np.random.default_rng(4)
    teacher = (3 * random.normal(size=(1, 2, 151_936))).astype(np.float32)
    student = (teacher + random.normal(size=teacher.shape)).astype(np.float32)
    temperature = options.get("temperature", 1.0)
    top = top_of(as_mx(teacher), 64, temperature)
    indices = np.array(top.indices)
    assert set(indices[0, 0]) == set(likeliest(teacher, 64)[0, 0])
    found = value(loss, student, Targets(mx.zeros((1, 2), mx.int32), top=top), options)
    log_p, log_q = (outcomes64(x.astype(np.float64) / temperature, indices, True) for x in (teacher, student))
    wanted = divergence64(loss, log_p, log_q, tail=True, **own_options(options))
    # Nearly all mass is in one outcome, the tail, and some values are below 0.001: 3e-8 is their last digit.
    np.testing.assert_allclose(found, scale_of(loss, options) * wanted, rtol=1e-5, atol=3e-8)


# ---- what needs the tail


def without_tail(p: np.ndarray) -> Targets:
    indices = mx.arange(len(p), dtype=mx.int32)[None, None]
    return Targets(mx.array([[0]]), top=Top(indices, as_mx(np.log(p))[None, None], None))


def at(loss: str, p: np.ndarray, q: np.ndarray) -> float:
    """A loss without tail, where the student puts `q` on the teacher's tokens and the rest on one other."""
    student = np.log(np.append(q, 1 - q.sum()))[None, None]
    return float(value(loss, student, without_tail(p))[0, 0])


P = np.array([0.5, 0.2, 0.1])


@pytest.mark.parametrize("loss", sorted(NEEDS_TAIL))
def test_what_needs_the_tail_is_lower_where_the_student_leaves_the_top(loss):
    leaving = {"reverse_kl": P / math.e, "skewed_reverse_kl": P / 2.5}.get(loss, P * [1, 1, 0.5])
    assert abs(at(loss, P, P)) < 1e-6
    assert at(loss, P, leaving) < -0.005
    if loss != "adaptive_kl":
        assert abs(at(loss, P, P * 1e-6)) < 1e-4  # gone altogether, and as good as perfect
    with_tail = Targets(mx.array([[0]]), top=top_of(as_mx(np.log(np.append(P, 1 - P.sum())))[None, None], 3))
    student = np.log(np.append(leaving, 1 - leaving.sum()))[None, None]
    assert value(loss, student, with_tail)[0, 0] > 0.005


@pytest.mark.parametrize("loss", sorted(NEEDS_TEACHER - set(NEEDS_TAIL)))
def test_what_does_not_need_the_tail_is_lowest_at_the_teachers_proportions(loss):
    """Over all students of a fine grid. Jensen-Shannon and total variation even keep the teacher's mass."""
    steps = np.linspace(0.01, 1, 34)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    grid = grid[grid.sum(-1) < 0.999]
    best = P if loss in ("jensen_shannon", "total_variation") else P / P.sum() * (1 - 1e-6)
    rows = np.concatenate([grid, P[None], best[None]])
    students = np.log(np.concatenate([rows, 1 - rows.sum(-1, keepdims=True)], -1))[None]
    one = without_tail(P).top
    assert one is not None
    many = Top(*(mx.broadcast_to(x, (1, len(rows), 3)) for x in one[:2]), None)
    found = value(loss, students, Targets(mx.zeros((1, len(rows)), mx.int32), top=many))[0]
    assert found[-1] <= found.min() + 1e-6
    far_ones = np.abs(grid - best).sum(-1) > 0.1
    assert far_ones.sum() > 1000
    assert found[: len(grid)][far_ones].min() > found[-1] + 1e-3


# ---- top_of and top_masses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_top_of_is_its_definition(dtype, temperature):
    logits = (4 * mx.random.normal((B, T, 50), key=mx.random.key(1))).astype(dtype)
    exact = np.array(logits.astype(mx.float32), dtype=np.float64)
    top = top_of(logits, 5, temperature)
    assert (top.indices.shape, top.indices.dtype, top.log_p.dtype) == ((B, T, 5), mx.int32, mx.float32)
    assert top.log_tail is not None and top.log_tail.dtype == mx.float32
    indices = np.array(top.indices)
    wanted = outcomes64(exact / temperature, indices, True)
    np.testing.assert_allclose(np.array(top.log_p), wanted[..., :-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(top.log_tail), wanted[..., -1], rtol=1e-5, atol=1e-6)
    kept = np.take_along_axis(exact, indices, -1).min(-1)
    rest = exact.copy()
    np.put_along_axis(rest, indices, -np.inf, -1)
    assert (kept >= rest.max(-1)).all()


def test_a_tiny_tail_keeps_its_digits():
    """exp(-40) is nothing beside one: what is missing to one is not the tail, the sum of the rest is."""
    logits = np.array([[[40.0, 0.0, 39.0, 1.0]]])
    top = top_of(as_mx(logits), 2)
    wanted = outcomes64(logits, np.array([[[0, 2]]]), True)[..., -1]
    assert top.log_tail is not None
    np.testing.assert_allclose(np.array(top.log_tail), wanted, rtol=1e-6)
    missing = 1 - float(mx.exp(top.log_p).sum())
    assert missing <= 0 or abs(math.log(missing) / wanted.item() - 1) > 0.1


def test_top_of_passes_no_gradient_and_refuses_a_k_that_cannot_be():
    logits = mx.random.normal((1, 2, 6), key=mx.random.key(0))
    reached = mx.grad(lambda x: top_of(x, 2).log_p.sum() + top_of(x, 6).log_p.sum())(logits)
    assert float(mx.abs(reached).max()) == 0
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"between 1 and the vocabulary of 6; got {k}"):
            top_of(logits, k)


def test_top_masses_are_their_definition():
    random = np.random.default_rng(3)
    teacher, student = 2 * random.normal(size=(2, B, T, 40))
    for temperature in (1.0, 2.0):
        top = top_of(as_mx(teacher), 8, temperature)
        ours, theirs, overlap = (np.array(x) for x in top_masses(as_mx(student), top, temperature))
        indices = likeliest(teacher, 8)
        for found, logits in ((ours, teacher), (theirs, student)):
            p = np.exp(log_softmax64(logits / temperature))
            np.testing.assert_allclose(found, np.take_along_axis(p, indices, -1).sum(-1), rtol=1e-5)
        both = [
            len(set(a) & set(b)) / 8
            for a, b in zip(indices.reshape(-1, 8), likeliest(student, 8).reshape(-1, 8), strict=True)
        ]
        np.testing.assert_allclose(overlap.ravel(), both)
        assert overlap.min() < overlap.max() < 1
    same = top_masses(as_mx(teacher), top_of(as_mx(teacher), 8))
    np.testing.assert_allclose(np.array(same[0]), np.array(same[1]), rtol=1e-5)
    assert float(same[2].min()) == 1


def test_top_masses_pass_no_gradient():
    teacher, student = mx.random.normal((2, 1, 3, 9), key=mx.random.key(0))
    top = top_of(teacher, 4)
    reached = mx.grad(lambda s: sum(x.sum() for x in top_masses(s, top)))(student)
    assert float(mx.abs(reached).max()) == 0
    compiled = mx.compile(lambda s, *t: top_masses(s, Top(*t)))(student, *top)
    for found, wanted in zip(compiled, top_masses(student, top), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-6)


def test_the_tail_is_never_in_the_head():
    """Half the mass is in the tail: the head is the two tokens that are named, the gap of the tail is not."""
    p, q = np.array([0.3, 0.2, 0.25, 0.25]), np.array([0.3, 0.2, 0.45, 0.05])
    both = np.array([0.2, 0.1, 0.4, 0.3])
    indices = mx.array([[[0, 1]]])
    top = Top(indices, as_mx(np.log(p[:2]))[None, None], as_mx(np.log([[p[2:].sum()]])))
    targets = Targets(mx.array([[0]]), top=top)
    assert abs(value("adaptive_kl", np.log(q)[None, None], targets)[0, 0]) < 1e-6
    found = value("adaptive_kl", np.log(both)[None, None], targets, {"head": 0.9})[0, 0]
    forward, reverse = (
        value(x, np.log(both)[None, None], targets)[0, 0] for x in ("forward_kl", "reverse_kl")
    )
    assert found == pytest.approx((forward + reverse) / 2, rel=1e-5)  # the tail's gap is half of all
    assert abs(forward - reverse) > 1e-3
