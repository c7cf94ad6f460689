"""Token losses against PyTorch: its `kl_div`, autograd, and the mixture of TRL's generalized JSD.

An implementation that shares nothing with ours but the random tensors. Skipped where torch is absent.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
from test_losses import as_mx, dense, gradient, value

from mlx_distill.losses import LOSSES, Targets, top_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

B, T, V, K = 2, 5, 4000, 32


@pytest.fixture(scope="module")
def logits():
    random = np.random.default_rng(0)
    teacher = 3 * random.normal(size=(B, T, V))
    return (teacher + 2 * random.normal(size=teacher.shape)).astype(np.float32), teacher.astype(np.float32)


def kl(log_a, log_b):
    """KL(a || b) a position. torch's first argument is b, and with log_target both are logarithms."""
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def log_mixture(weights, logs):
    """log of sum weights * exp(logs), as TRL forms it."""
    stacked = torch.stack([log + math.log(weight) for weight, log in zip(weights, logs, strict=True)])
    return torch.logsumexp(stacked, dim=0)


def generalized_jsd(log_p, log_q, beta):
    """TRL's: beta is the teacher's share of the mixture; 0 is forward KL, 1 reverse KL, set by hand."""
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = log_mixture((1 - beta, beta), (log_q, log_p))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def adaptive(log_p, log_q, head, tail=False):
    """By ranks: the sorted teacher, the mass before each token, and weights that carry no gradient."""
    p, q = log_p.exp(), log_q.detach().exp()
    tokens = p.shape[-1] - tail
    ranked, order = p[..., :tokens].sort(dim=-1, descending=True)
    in_head = ranked.cumsum(-1) - ranked < head
    gap = (ranked - q.gather(-1, order)).abs()
    weight = (gap * in_head).sum(-1) / (p - q).abs().sum(-1)
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)


CASES = [
    ("forward_kl", {}, kl),
    ("reverse_kl", {}, lambda p, q: kl(q, p)),
    ("forward_kl", {"temperature": 2.0}, kl),
    ("jensen_shannon", {}, lambda p, q: generalized_jsd(p, q, 0.5)),
    ("jensen_shannon", {"beta": 0.1}, lambda p, q: generalized_jsd(p, q, 0.1)),
    ("jensen_shannon", {"beta": 0.9, "temperature": 1.5}, lambda p, q: generalized_jsd(p, q, 0.9)),
    ("jensen_shannon", {"beta": 0.3, "normalize": True}, lambda p, q: generalized_jsd(p, q, 0.3) / 0.21),
    ("skewed_forward_kl", {"alpha": 0.0}, lambda p, q: generalized_jsd(p, q, 0)),
    ("skewed_reverse_kl", {"alpha": 0.0}, lambda p, q: generalized_jsd(p, q, 1)),
    ("skewed_forward_kl", {}, lambda p, q: kl(p, log_mixture((0.1, 0.9), (p, q)))),
    ("skewed_reverse_kl", {"temperature": 2.0}, lambda p, q: kl(q, log_mixture((0.9, 0.1), (p, q)))),
    ("adaptive_kl", {}, lambda p, q: adaptive(p, q, 0.5)),
    ("total_variation", {}, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
]
each = pytest.mark.parametrize(("loss", "options", "formula"), CASES)


def in_torch(student, teacher, formula, loss, options, indices=None):
    """Value and gradient in float64, over the vocabulary or over the tokens at `indices` and a tail."""
    temperature = options.get("temperature", 1.0)
    student = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    sides = [
        torch.log_softmax(x / temperature, dim=-1)
        for x in (torch.tensor(teacher, dtype=torch.float64), student)
    ]
    if indices is not None:
        index = torch.tensor(indices, dtype=torch.int64)
        kept = [side.gather(-1, index) for side in sides]
        tails = [side.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True) for side in sides]
        sides = [torch.cat(pair, dim=-1) for pair in zip(kept, tails, strict=True)]
    scale = temperature**2 if loss != "total_variation" else 1
    nats = scale * formula(*sides)
    nats.sum().backward()
    return nats.detach().numpy(), student.grad.numpy()


def test_each_divergence_is_compared():
    assert {loss for loss, _, _ in CASES} == set(LOSSES) - {"cross_entropy"}


@each
def test_dense_is_what_torch_gives(loss, options, formula, logits):
    student, teacher = logits
    nats, slope = in_torch(student, teacher, formula, loss, options)
    np.testing.assert_allclose(value(loss, student, dense(teacher), options), nats, rtol=1e-5)
    found = gradient(loss, student, dense(teacher), options)
    assert np.abs(found - slope).max() < 1e-5 * np.abs(slope).max()

    # torch's arguments taken in the order in which a formula is read would not agree.
    swapped, _ = in_torch(student, teacher, lambda p, q: formula(q, p), loss, options)
    symmetric = loss == "total_variation" or (loss == "jensen_shannon" and options.get("beta", 0.5) == 0.5)
    assert (np.abs(swapped / nats - 1).max() < 1e-6) == symmetric


@each
def test_top_k_with_its_tail_is_what_torch_gives(loss, options, formula, logits):
    student, teacher = logits
    top = top_of(as_mx(teacher), K, options.get("temperature", 1.0))
    if loss == "adaptive_kl":

        def formula(p, q):
            return adaptive(p, q, 0.5, tail=True)

    targets = Targets(mx.zeros((B, T), mx.int32), top=top)
    nats, slope = in_torch(student, teacher, formula, loss, options, np.array(top.indices))
    np.testing.assert_allclose(value(loss, student, targets, options), nats, rtol=1e-5)
    found = gradient(loss, student, targets, options)
    assert np.abs(found - slope).max() < 1e-5 * np.abs(slope).max()


def test_cross_entropy_is_what_torch_gives(logits):
    student, _ = logits
    labels = np.random.default_rng(1).integers(V, size=(B, T))
    given = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    nats = torch.nn.functional.cross_entropy(
        given.view(-1, V), torch.tensor(labels).view(-1), reduction="none"
    )
    nats.sum().backward()
    targets = Targets(mx.array(labels))
    found = value("cross_entropy", student, targets)
    np.testing.assert_allclose(found.ravel(), nats.detach().numpy(), rtol=1e-5)
    slope = given.grad.numpy()
    assert np.abs(gradient("cross_entropy", student, targets) - slope).max() < 1e-5
