"""Token losses against their definitions in NumPy float64, and their gradients against finite differences.

On whole logits; test_top_losses.py does the same on the teacher's top k, with the definitions below.
"""

import inspect
import math

import mlx.core as mx
import numpy as np
import pytest
from pydantic import PositiveFloat, TypeAdapter, ValidationError

from mlx_distill.losses import LOSSES, NEEDS_TAIL, NEEDS_TEACHER, Targets
from mlx_distill.losses.menu import options_of

B, T, V = 2, 3, 7

CASES: list[tuple[str, dict]] = [
    ("cross_entropy", {}),
    ("forward_kl", {}),
    ("forward_kl", {"temperature": 2.5}),
    ("forward_kl", {"temperature": 2.5, "temperature_squared": False}),
    ("reverse_kl", {}),
    ("reverse_kl", {"temperature": 0.7}),
    ("jensen_shannon", {}),
    ("jensen_shannon", {"beta": 0.1, "temperature": 2.0}),
    ("jensen_shannon", {"beta": 0.9, "normalize": True}),
    ("jensen_shannon", {"beta": 0.001, "normalize": True}),
    ("skewed_forward_kl", {}),
    ("skewed_forward_kl", {"alpha": 0.0}),
    ("skewed_forward_kl", {"alpha": 0.5, "temperature": 2.0}),
    ("skewed_reverse_kl", {}),
    ("skewed_reverse_kl", {"alpha": 0.0}),
    ("skewed_reverse_kl", {"alpha": 0.5, "temperature": 2.0}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"head": 0.9, "temperature": 2.0}),
    ("total_variation", {}),
    ("total_variation", {"temperature": 2.0, "temperature_squared": True}),
]
DIVERGENCES = [case for case in CASES if case[0] != "cross_entropy"]
NAMES = sorted(NEEDS_TEACHER)
each_case = pytest.mark.parametrize(("loss", "options"), CASES)
each_divergence = pytest.mark.parametrize(("loss", "options"), DIVERGENCES)
each_name = pytest.mark.parametrize("loss", NAMES)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(B, T, V)), 3 * random.normal(size=(B, T, V))


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(V, size=(B, T))


# ---- the definitions: log-probabilities (..., outcomes) float64 in, nats (...) out


def log_softmax64(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl64(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """Sum a log(a / b), where outcomes with a = 0 count nothing."""
    a = np.exp(log_a)
    with np.errstate(invalid="ignore"):
        return np.where(a > 0, a * (log_a - log_b), 0).sum(-1)


def mixture64(share: float, log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log(share) + log_a, np.log(1 - share) + log_b)


def head_weight64(log_p: np.ndarray, log_q: np.ndarray, head: float, tail: bool) -> np.ndarray:
    """The head's share of the gap, row by row: the likeliest tokens until they reach `head`, and equals."""
    p, gap = np.exp(log_p), np.abs(np.exp(log_p) - np.exp(log_q))
    weight = np.zeros(p.shape[:-1])
    for row in np.ndindex(weight.shape):
        mass, inside = 0.0, []
        for token in np.argsort(-p[row][: p.shape[-1] - tail]):
            if mass >= head:
                break
            mass += p[row][token]
            inside.append(token)
        inside = np.arange(p.shape[-1] - tail)[p[row][: p.shape[-1] - tail] >= p[row][inside[-1]]]
        weight[row] = gap[row][inside].sum() / gap[row].sum()
    return weight


def divergence64(
    loss: str,
    log_p: np.ndarray,
    log_q: np.ndarray,
    *,
    beta: float = 0.5,
    normalize: bool = False,
    alpha: float = 0.1,
    head: float = 0.5,
    frozen: np.ndarray | None = None,
    tail: bool = False,
) -> np.ndarray:
    """A divergence by its definition, before any temperature squared.

    Args:
        frozen: the log_q that the weights of adaptive_kl come from, where they must not move.
        tail: the last outcome is the tail.
    """
    match loss:
        case "forward_kl":
            return kl64(log_p, log_q)
        case "reverse_kl":
            return kl64(log_q, log_p)
        case "jensen_shannon":
            log_m = mixture64(beta, log_p, log_q)
            nats = beta * kl64(log_p, log_m) + (1 - beta) * kl64(log_q, log_m)
            return nats / (beta * (1 - beta)) if normalize else nats
        case "skewed_forward_kl":
            return kl64(log_p, mixture64(alpha, log_p, log_q))
        case "skewed_reverse_kl":
            return kl64(log_q, mixture64(alpha, log_q, log_p))
        case "adaptive_kl":
            weight = head_weight64(log_p, log_q if frozen is None else frozen, head, tail)
            return weight * kl64(log_p, log_q) + (1 - weight) * kl64(log_q, log_p)
        case "total_variation":
            return np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1) / 2
    raise AssertionError(loss)


def scale_of(loss: str, options: dict) -> float:
    default = inspect.signature(LOSSES[loss]).parameters["temperature_squared"].default
    squared = options.get("temperature_squared", default)
    return options.get("temperature", 1.0) ** 2 if squared else 1.0


def own_options(options: dict) -> dict:
    return {key: value for key, value in options.items() if not key.startswith("temperature")}


def dense64(loss, student, teacher, labels, options, frozen=None) -> np.ndarray:
    """What a loss on whole logits must give, float64."""
    if loss == "cross_entropy":
        return -np.take_along_axis(log_softmax64(student), labels[..., None], -1)[..., 0]
    temperature = options.get("temperature", 1.0)
    log_p, log_q = log_softmax64(teacher / temperature), log_softmax64(student / temperature)
    kept = None if frozen is None else log_softmax64(frozen / temperature)
    return scale_of(loss, options) * divergence64(loss, log_p, log_q, frozen=kept, **own_options(options))


# ---- helpers


def as_mx(x) -> mx.array:
    return mx.array(np.asarray(x), dtype=mx.float32)


def dense(teacher, labels=None) -> Targets:
    shape = np.shape(teacher)[:-1]
    return Targets(mx.array(np.zeros(shape, int) if labels is None else labels), as_mx(teacher))


def value(loss: str, student, targets: Targets, options: dict | None = None) -> np.ndarray:
    found = LOSSES[loss](as_mx(student), targets, **(options or {}))
    assert found.shape == np.shape(student)[:-1]
    assert found.dtype == mx.float32
    return np.array(found)


def gradient(loss: str, student, targets: Targets, options: dict | None = None) -> np.ndarray:
    return np.array(mx.grad(lambda s: LOSSES[loss](s, targets, **(options or {})).sum())(as_mx(student)))


def slope(definition, student: np.ndarray) -> np.ndarray:
    """Central differences of the sum of `definition(student)`, float64."""
    found, h = np.zeros_like(student), 1e-5
    for index in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[index] += h
        down[index] -= h
        found[index] = (definition(up) - definition(down)).sum() / (2 * h)
    return found


def far(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest relative error over the positions."""
    return float(np.max(np.abs(found - wanted) / np.abs(wanted)))


# ---- values and gradients


@each_case
def test_value_is_its_definition(loss, options, logits, labels):
    student, teacher = logits
    found = value(loss, student, dense(teacher, labels), options)
    wanted = dense64(loss, student, teacher, labels, options)
    assert far(found, wanted) < 1e-5

    # The usual mistakes do not pass: sides swapped, and the factor of the temperature lost or added.
    if loss not in ("cross_entropy", "total_variation") and options.get("beta", 0.5) == 0.5:
        swapped = dense64(loss, teacher, student, labels, options)
        assert (far(swapped, wanted) > 1e-2) == (loss != "jensen_shannon")
    if "temperature" in options:
        other = {**options, "temperature_squared": scale_of(loss, options) == 1}
        assert far(dense64(loss, student, teacher, labels, other), wanted) > 0.5


@each_case
def test_gradient_is_the_slope_of_the_definition(loss, options, logits, labels):
    student, teacher = logits
    found = gradient(loss, student, dense(teacher, labels), options)
    wanted = slope(lambda s: dense64(loss, s, teacher, labels, options, frozen=student), student)
    assert np.abs(wanted).max() > 0.02  # a zero gradient would agree with nothing
    rounding = 1e-5 if options.get("beta") == 0.001 else 2e-6  # divided by beta (1 - beta)
    np.testing.assert_allclose(found, wanted, atol=rounding * max(1, np.abs(wanted).max()))


def test_a_numpy_scalar_would_lose_the_gradient(logits):
    """What `math.log` guards against: the same mixture with `np.log` trains nothing, without an error."""
    student, teacher = logits
    log_p = as_mx(log_softmax64(teacher))
    share = np.float64(0.1)

    def skewed(s, one, other):
        log_q = s - mx.logsumexp(s, -1, keepdims=True)
        return -(mx.exp(log_p) * mx.logaddexp(one, mx.array(other - (log_p - log_q)))).sum()

    wanted = slope(lambda s: dense64("skewed_forward_kl", s, teacher, None, {}), student)
    right = mx.grad(lambda s: skewed(s, math.log(share), math.log(1 - share)))(as_mx(student))
    wrong = mx.grad(lambda s: skewed(s, math.log(share), np.log(1 - share)))(as_mx(student))
    np.testing.assert_allclose(np.array(right), wanted, atol=2e-6)
    assert np.abs(np.array(wrong)).max() == 0 < np.abs(wanted).max()


@each_divergence
def test_no_gradient_reaches_the_teacher(loss, options, logits):
    student, teacher = (as_mx(x) for x in logits)
    reached = mx.grad(lambda t: LOSSES[loss](student, dense(teacher)._replace(logits=t), **options).sum())
    assert float(mx.abs(reached(teacher)).max()) == 0


@each_divergence
def test_zero_at_equality_and_no_slope_there(loss, options, logits):
    student, teacher = logits
    small = 1e-6 / (0.001 * 0.999) if options.get("beta") == 0.001 else 2e-6 if options else 1e-6
    moved = student + 4  # another constant on the logits is the same distribution
    assert np.abs(value(loss, student, dense(student), options)).max() < small
    assert np.abs(value(loss, moved, dense(student), options)).max() < 1.5 * small
    if loss != "total_variation":  # which has a kink there
        assert np.abs(gradient(loss, student, dense(student), options)).max() < small
    assert np.abs(value(loss, student, dense(teacher), options)).min() > 1e-3


@each_case
def test_compiled_and_checkpointed_give_the_same(loss, options, logits, labels):
    student, teacher = (as_mx(x) for x in logits)

    def total(s, t, y):
        return LOSSES[loss](s, Targets(y, t), **options).sum()

    given = (student, teacher, mx.array(labels))
    plain = mx.value_and_grad(total)(*given)
    for other in (mx.compile(mx.value_and_grad(total)), mx.value_and_grad(mx.checkpoint(total))):
        for found, wanted in zip(other(*given), plain, strict=True):
            np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-5, atol=1e-6)


# ---- identities


def test_jensen_shannon_is_symmetric_and_bounded(logits):
    student, teacher = 10 * logits[0], 10 * logits[1]
    found = value("jensen_shannon", student, dense(teacher))
    np.testing.assert_allclose(found, value("jensen_shannon", teacher, dense(student)), rtol=1e-5)
    assert found.max() <= math.log(2) + 1e-6
    assert found.max() > 0.6  # the bound is near, and so tells something
    uneven = value("jensen_shannon", student, dense(teacher), {"beta": 0.2})
    assert np.abs(uneven - value("jensen_shannon", teacher, dense(student), {"beta": 0.2})).max() > 0.01
    mirrored = value("jensen_shannon", teacher, dense(student), {"beta": 0.8})
    np.testing.assert_allclose(uneven, mirrored, rtol=1e-5)


@pytest.mark.parametrize(("beta", "end"), [(1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")])
def test_normalized_jensen_shannon_meets_the_kls(beta, end, logits):
    student, teacher = logits[0] / 3, logits[1] / 3
    wanted, slope_there = value(end, student, dense(teacher)), gradient(end, student, dense(teacher))
    options = {"beta": beta, "normalize": True}
    np.testing.assert_allclose(value("jensen_shannon", student, dense(teacher), options), wanted, rtol=5e-3)
    found = gradient("jensen_shannon", student, dense(teacher), options)
    np.testing.assert_allclose(found, slope_there, atol=2e-2 * np.abs(slope_there).max())

    # Without the division the value tends to nothing, whatever the distributions.
    assert value("jensen_shannon", student, dense(teacher), {"beta": beta}).max() < 1e-3
    other = value("forward_kl" if end == "reverse_kl" else "reverse_kl", student, dense(teacher))
    assert far(other, wanted) > 0.05


@pytest.mark.parametrize("side", ["forward_kl", "reverse_kl"])
def test_skewed_without_skew_is_plain(side, logits):
    student, teacher = logits
    plain = value(side, student, dense(teacher))
    np.testing.assert_array_equal(value(f"skewed_{side}", student, dense(teacher), {"alpha": 0.0}), plain)
    near = value(f"skewed_{side}", student, dense(teacher), {"alpha": 1e-7})
    np.testing.assert_allclose(near, plain, rtol=1e-2)
    skewed = value(f"skewed_{side}", 100 * student, dense(100 * teacher), {"alpha": 0.1})
    assert skewed.max() <= -math.log(0.1) + 1e-5
    assert value(side, 100 * student, dense(100 * teacher)).max() > 100


def test_jensen_shannon_is_made_of_the_two_skewed_kls(logits):
    student, teacher = logits
    one = value("skewed_forward_kl", student, dense(teacher), {"alpha": 0.3})
    other = value("skewed_reverse_kl", student, dense(teacher), {"alpha": 0.7})
    found = value("jensen_shannon", student, dense(teacher), {"beta": 0.3})
    np.testing.assert_allclose(found, 0.3 * one + 0.7 * other, rtol=1e-5)
    assert far(0.7 * one + 0.3 * other, found) > 0.05  # the shares the other way round


def test_near_equality_all_but_total_variation_are_half_of_chi_squared(logits):
    _, teacher = logits
    student = teacher + 0.03 * np.random.default_rng(8).normal(size=teacher.shape)
    p, q = np.exp(log_softmax64(teacher)), np.exp(log_softmax64(student))
    half = ((p - q) ** 2 / p).sum(-1) / 2
    factors = {"jensen_shannon": 0.25, "skewed_forward_kl": 0.81, "skewed_reverse_kl": 0.81}
    assert half.max() > 1e-5
    for loss in NEEDS_TEACHER:
        found = value(loss, student, dense(teacher))
        near = np.isclose(found, factors.get(loss, 1) * half, rtol=0.05, atol=1e-6).all()
        assert near == (loss != "total_variation")


def test_total_variation_is_what_a_draft_loses(logits):
    """1 - sum min(p, q), the rate at which a speculative draft is refused."""
    student, teacher = logits
    lower = np.minimum(np.exp(log_softmax64(student)), np.exp(log_softmax64(teacher)))
    np.testing.assert_allclose(
        value("total_variation", student, dense(teacher)), 1 - lower.sum(-1), rtol=1e-5
    )


@each_case
def test_adding_a_constant_to_logits_changes_nothing(loss, options, logits, labels):
    student, teacher = logits
    plain = value(loss, student, dense(teacher, labels), options)
    moved = value(loss, student + 5, dense(teacher - 3, labels), options)
    np.testing.assert_allclose(moved, plain, rtol=1e-4, atol=2e-5)


@each_case
@pytest.mark.parametrize("low", [-np.inf, -1e4])
def test_emptied_padding_rows_of_the_vocabulary_change_nothing(loss, options, low, logits, labels):
    student, teacher = logits
    padding = np.full((B, T, 3), low)
    wide_student, wide_teacher = (np.concatenate([x, padding], -1) for x in logits)
    plain = value(loss, student, dense(teacher, labels), options)
    padded = value(loss, wide_student, dense(wide_teacher, labels), options)
    np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-6)
    found = gradient(loss, wide_student, dense(wide_teacher, labels), options)
    np.testing.assert_allclose(
        found[..., :V], gradient(loss, student, dense(teacher, labels), options), atol=1e-5
    )
    assert np.abs(found[..., V:]).max() == 0

    # Left as the models give them, they count: that is why logits are cut to the tokenizer first.
    noise = np.random.default_rng(2).normal(size=(2, B, T, 3))
    counted = value(
        loss,
        np.concatenate([student, noise[0]], -1),
        dense(np.concatenate([teacher, noise[1]], -1), labels),
        options,
    )
    assert np.abs(counted - plain).max() > 1e-3


# ---- temperature


@each_name
def test_temperature_squared_keeps_the_size_of_the_gradient(loss, logits):
    """By default, from 8 to 16; what is left out changes it 4 times, and total variation 2 times."""
    student, teacher = logits[0] / 3, logits[1] / 3

    def size(temperature, **options):
        found = gradient(loss, student, dense(teacher), {"temperature": temperature, **options})
        return float(np.sqrt((found**2).sum()))

    with_it = size(8.0, temperature_squared=True) / size(16.0, temperature_squared=True)
    without = size(8.0, temperature_squared=False) / size(16.0, temperature_squared=False)
    assert without == pytest.approx(4 * with_it, rel=1e-3)
    assert with_it == pytest.approx(0.5 if loss == "total_variation" else 1.0, rel=0.1)
    assert scale_of(loss, {"temperature": 2.0}) == (1 if loss == "total_variation" else 4)


# ---- hard inputs


@each_divergence
@pytest.mark.parametrize("masked", [-1e4, -np.inf])
def test_a_token_that_the_teacher_rules_out(loss, options, masked, logits):
    student, teacher = logits
    teacher = teacher.copy()
    teacher[..., 2] = masked
    found = value(loss, student, dense(teacher), options)
    assert np.isfinite(found).all()
    assert np.isfinite(gradient(loss, student, dense(teacher), options)).all()
    # A reverse KL to -inf is infinite; there it stays finite and big. All others have a value.
    plain_reverse = loss in ("reverse_kl", "adaptive_kl") or (loss, options) == (
        "skewed_reverse_kl",
        {"alpha": 0.0},
    )
    if np.isfinite(masked) or not plain_reverse:
        wanted = dense64(loss, student, teacher, None, options)
        np.testing.assert_allclose(found, wanted, rtol=2e-5)
    else:
        reached = np.abs(gradient(loss, student, dense(teacher), options)).max()
        assert 10 < max(found.max(), reached) < 1e6  # an optimizer squares it


@each_divergence
def test_a_student_that_is_extremely_sure(loss, options, logits):
    """Logits 1e4 apart: probabilities underflow, logarithms must not."""
    student, teacher = logits
    student = student.copy()
    student[..., 4] = 1e4
    found = value(loss, student, dense(teacher), options)
    np.testing.assert_allclose(found, dense64(loss, student, teacher, None, options), rtol=2e-5)
    reached = gradient(loss, student, dense(teacher), options)
    assert np.isfinite(reached).all()
    if loss in ("forward_kl", "adaptive_kl"):  # these alone can pull such a student back
        assert np.abs(reached).max() > 0.05


def test_probabilities_instead_of_their_logarithms_would_not_do(logits):
    """The plain formula on float32 probabilities, for the student above."""
    student, teacher = logits
    student = student.copy()
    student[..., 4] = 1e4
    p, q = mx.softmax(as_mx(teacher), -1), mx.softmax(as_mx(student), -1)
    assert not np.isfinite(np.array((p * mx.log(p / q)).sum(-1))).any()
    assert np.isnan(np.array((q * mx.log(q / p)).sum(-1))).all()


@each_case
def test_half_precision_logits_are_summed_in_float32(loss, options):
    """70,000 nearly equal bfloat16 logits: a sum kept in bfloat16 would stop at 256."""
    size = 70_000
    random = np.random.default_rng(5)
    student, teacher = (as_mx(random.normal(size=(1, 1, size))).astype(mx.bfloat16) for _ in range(2))
    label = np.array([[3]])
    found = LOSSES[loss](student, Targets(mx.array(label), teacher), **options)
    assert found.dtype == mx.float32
    as_float64 = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (student, teacher))
    assert far(np.array(found), dense64(loss, *as_float64, label, options)) < 1e-5


@each_case
def test_value_over_a_real_vocabulary(loss, options):
    """151,936 tokens, a sharp teacher and a student near it: sums of many small terms."""
    random = np.random.default_rng(4)
    teacher = 3 * random.normal(size=(1, 2, 151_936))
    student = teacher + random.normal(size=teacher.shape)
    labels = np.array([[3, 100_000]])
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    found = value(loss, student, dense(teacher, labels), options)
    assert far(found, dense64(loss, student, teacher, labels, options)) < 1e-5


# ---- adaptive_kl


def test_adaptive_kl_weighs_by_the_gap_of_the_head():
    """A gap in the head alone is forward KL, one in the tail alone is reverse KL."""
    p = np.array([[[0.4, 0.3, 0.15, 0.1, 0.05]]])
    in_head, in_tail = p.copy(), p.copy()
    in_head[..., :2] = [0.2, 0.5]
    in_tail[..., 2:] = [0.05, 0.05, 0.2]
    for q, same, other in (
        (in_head, "forward_kl", "reverse_kl"),
        (in_tail, "reverse_kl", "forward_kl"),
    ):
        found = value("adaptive_kl", np.log(q), dense(np.log(p)))
        np.testing.assert_allclose(found, value(same, np.log(q), dense(np.log(p))), rtol=1e-4)
        assert far(found, value(other, np.log(q), dense(np.log(p)))) > 0.02


def test_the_head_does_not_depend_on_an_order_among_equals():
    """Four equal tokens: half the mass is any two of them, so all belong to the head."""
    student = np.array([[[0.0, 1.0, 2.0, 3.0]]])
    found = [
        value("adaptive_kl", student[..., order], dense(np.zeros((1, 1, 4))))
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1])
    ]
    wanted = value("forward_kl", student, dense(np.zeros((1, 1, 4))))
    np.testing.assert_allclose(found, [wanted] * 3, rtol=1e-5)


# ---- the registry


def test_options_are_read_off_the_signature():
    assert options_of("forward_kl") == {
        "temperature": (PositiveFloat, 1.0),
        "temperature_squared": (bool, True),
    }
    assert options_of("cross_entropy") == {}
    assert set(options_of("jensen_shannon")) == {"beta", "normalize", "temperature", "temperature_squared"}


@pytest.mark.parametrize(
    ("loss", "option", "wrong"),
    [
        ("jensen_shannon", "beta", 0.0),
        ("jensen_shannon", "beta", 1.0),
        ("skewed_forward_kl", "alpha", 1.0),
        ("skewed_reverse_kl", "alpha", -0.1),
        ("adaptive_kl", "head", 0.0),
        ("adaptive_kl", "head", 1.0),
        ("total_variation", "temperature", 0.0),
    ],
)
def test_options_out_of_range_are_refused_by_their_type(loss, option, wrong):
    adapter = TypeAdapter(options_of(loss)[option][0])
    assert adapter.validate_python(0.5) == 0.5
    with pytest.raises(ValidationError):
        adapter.validate_python(wrong)


def test_every_loss_has_its_cases():
    assert set(LOSSES) >= {loss for loss, _ in CASES}
    assert set(NEEDS_TEACHER) == {loss for loss, _ in DIVERGENCES}
    assert set(NEEDS_TAIL) < NEEDS_TEACHER
    tried = {(loss, option) for loss, options in CASES for option in options}
    assert {(loss, option) for loss in NEEDS_TEACHER for option in own_options(options_of(loss))} <= tried


@each_name
def test_a_loss_without_its_teacher_says_so(loss):
    with pytest.raises(ValueError, match="teacher's logits"):
        LOSSES[loss](mx.zeros((1, 1, 3)), Targets(mx.array([[0]])))
