"""The policy gradient against its definition, and against the reverse KL that it estimates."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import largest_gap, tiny_model, tiny_recipe

from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.losses import Targets, Top, policy_gradient, reverse_kl
from mlx_distill.losses.menu import MENU
from mlx_distill.optimizer import make_optimizer
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step

B, T, V = 2, 3, 7


def logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=(B, T, V))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def labels(seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(V, size=(B, T))


def targets(teacher: np.ndarray, label: np.ndarray) -> Targets:
    return Targets(mx.array(label), mx.array(teacher.astype(np.float32)))


def gradient(student: np.ndarray, told: Targets) -> np.ndarray:
    return np.array(mx.grad(lambda s: policy_gradient(s, told).sum())(mx.array(student.astype(np.float32))))


def chosen(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, label[..., None], -1)[..., 0]


def advantage(student: np.ndarray, teacher: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A = log p(y) - log q(y), (B, T) float64."""
    return chosen(log_softmax(teacher), label) - chosen(log_softmax(student), label)


def test_value_and_gradient_are_the_definition() -> None:
    """The value is -A; the gradient by the logits is -A (onehot(y) - q), of each place alone."""
    student, teacher, label = logits(0), logits(1), labels()
    found = np.array(policy_gradient(mx.array(student.astype(np.float32)), targets(teacher, label)))
    gain = advantage(student, teacher, label)
    np.testing.assert_allclose(found, -gain, atol=1e-5)
    score = np.eye(V)[label] - np.exp(log_softmax(student))
    expected = -gain[..., None] * score
    np.testing.assert_allclose(gradient(student, targets(teacher, label)), expected, atol=1e-5)
    # Differentiating the value itself, the usual mistake, gives the score alone, without the advice.
    assert np.abs(expected - score).max() > 1


def test_its_mean_over_the_student_is_the_reverse_kl() -> None:
    """Every token of a small vocabulary, weighed by q: value and gradient are those of KL(q || p)."""
    student, teacher = logits(3), logits(4)
    told = [targets(teacher, np.full((B, T), y)) for y in range(V)]
    values = np.stack([np.array(policy_gradient(mx.array(student.astype(np.float32)), one)) for one in told])
    slopes = np.stack([gradient(student, one) for one in told])
    exact = mx.array(student.astype(np.float32))
    kl = np.array(reverse_kl(exact, told[0]))
    slope = np.array(mx.grad(lambda s: reverse_kl(s, told[0]).sum())(exact))

    def mean(weights: np.ndarray, of: np.ndarray) -> np.ndarray:
        by_token = np.moveaxis(weights, -1, 0)
        return (by_token.reshape(*by_token.shape, *[1] * (of.ndim - by_token.ndim)) * of).sum(0)

    q, p = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    np.testing.assert_allclose(mean(q, values), kl, atol=1e-5)
    np.testing.assert_allclose(mean(q, slopes), slope, atol=1e-5)
    # Tokens that the teacher wrote, and the advantage with its sign turned round, lead elsewhere.
    assert np.abs(mean(p, slopes) - slope).max() > 0.1
    assert np.abs(mean(q, -slopes) - slope).max() > 0.1


def test_it_is_nothing_where_both_agree() -> None:
    student, label = logits(5), labels()
    told = targets(student + 3, label)
    assert np.abs(np.array(policy_gradient(mx.array(student.astype(np.float32)), told))).max() < 1e-5
    assert np.abs(gradient(student, told)).max() < 1e-5


def test_no_gradient_reaches_the_teacher() -> None:
    student, label = mx.array(logits(0).astype(np.float32)), mx.array(labels())

    def of_teacher(teacher: mx.array) -> mx.array:
        return policy_gradient(student, Targets(label, teacher)).sum()

    assert float(mx.abs(mx.grad(of_teacher)(mx.array(logits(1).astype(np.float32)))).max()) == 0


def test_a_token_that_the_teacher_rules_out_stays_a_number() -> None:
    teacher, label = logits(1), labels()
    np.put_along_axis(teacher, label[..., None], -np.inf, -1)
    told = Targets(mx.array(label), mx.array(teacher.astype(np.float32)))
    values = np.array(policy_gradient(mx.array(logits(0).astype(np.float32)), told))
    assert np.isfinite(values).all() and (values > 9e4).all()
    assert np.isfinite(gradient(logits(0), told)).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: mx.Dtype) -> None:
    student, teacher = (mx.array(logits(seed).astype(np.float32)).astype(dtype) for seed in (0, 1))
    label = mx.array(labels())
    found = policy_gradient(student, Targets(label, teacher))
    wide = policy_gradient(student.astype(mx.float32), Targets(label, teacher.astype(mx.float32)))
    assert found.dtype == mx.float32
    assert mx.array_equal(found, wide)


def test_a_top_k_is_not_enough() -> None:
    top = Top(mx.zeros((1, 1, 1), mx.int32), mx.zeros((1, 1, 1)), None)
    with pytest.raises(ValueError, match="not its top k"):
        policy_gradient(mx.zeros((1, 1, 3)), Targets(mx.array([[0]]), top=top))


def test_it_trains_through_chunks_as_it_is_written() -> None:
    """The objective's gradient on a batch is that of the plain sum over its counted labels."""
    student, teacher = tiny_model(50).model, LiveTeacher(tiny_model(50, seed=9), 50)
    how = tiny_recipe(
        objective={"policy_gradient": {}},
        generate={"on_policy": {"max_tokens": 8}},
        train={"compile": False},
    )
    batch = make_batch([Encoded([5, 6, 7, 8, 9, 1], 2), Encoded([5, 3, 2, 4], 3)])
    objective = make_objective(student, [teacher], how, 50)
    step = make_step(objective, make_optimizer(how.train), how)
    sums, parts = step.gradients(batch, [teacher.targets(batch)], {})

    def plain(weights: mx.array) -> mx.array:
        student.model.embed_tokens.weight = weights
        told = Targets(batch.labels, teacher.logits(batch.tokens))
        return mx.where(batch.counted, policy_gradient(student(batch.tokens), told), 0).sum()

    value, slope = mx.value_and_grad(plain)(student.model.embed_tokens.weight)
    assert float(parts["policy_gradient"]) == pytest.approx(float(value), abs=1e-4)
    found = sums["model"]["embed_tokens"]["weight"]
    assert largest_gap({"weight": found}, {"weight": slope}) < 1e-4


def test_the_menu_has_it() -> None:
    entry = MENU["policy_gradient"]
    assert (entry.family, entry.needs_teacher, entry.on_labels, entry.own_options) == (
        "token",
        True,
        False,
        {},
    )
    assert MENU["cross_entropy"].on_labels and MENU["exit_cross_entropy"].on_labels
    assert not MENU["exit_kl"].on_labels and not MENU["exit_kl"].needs_teacher
