"""How well a model predicts held-out answers, and how near it stays to its teacher."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Batch, Encoded, in_order, make_batch
from mlx_distill.losses.outcomes import top_masses, top_of
from mlx_distill.losses.sums import sum_last
from mlx_distill.losses.targets import log_softmax
from mlx_distill.progress import Progress, silent
from mlx_distill.teacher import LiveTeacher

TOP = 8  # likeliest tokens whose masses and overlap are compared
BINS = 15  # of confidence, all equally wide, as in Guo et al. 2017
LOGITS = 2**24  # numbers of one model's logits held at once: 64 MiB in float32, in up to 15 copies


class RowFidelity(NamedTuple):
    """What was seen at the T counted tokens of one row, in their order."""

    nll: np.ndarray  # (T,) float32 nats, -log q(label)
    kl: np.ndarray | None  # (T,) float32 nats, KL(teacher || model); None without a teacher, as `theirs`
    mine: np.ndarray  # (T,) int32, the id that the model finds likeliest
    theirs: np.ndarray | None  # (T,) int32, the id that the teacher finds likeliest


def fidelity(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    teacher: LiveTeacher | None = None,
    text_bytes: int | None = None,
    title: str = "fidelity",
    progress: Progress = silent,
) -> tuple[dict[str, float], list[RowFidelity]]:
    """Measure a model on the counted labels of `rows`, the model in eval mode.

    Args:
        teacher: the distribution to compare with; None leaves out what is said of it.
        text_bytes: UTF-8 bytes of the counted text; None leaves out `bits_per_byte`.

    Returns:
        What holds of all counted tokens together, and the tokens of each row, in the order given.

        nll: nats a counted token; perplexity: e to it. bits_per_byte. kl: mean KL(teacher || model) in nats
        a token, at temperature 1; kl_median, kl_p95: its median and 95th percentile over tokens.
        top1_agreement: share of tokens at which both find the same token likeliest. ece: expected
        calibration error of the likeliest token (Guo et al. 2017, arXiv 1706.04599, equation 3, 15 bins):
        how far confidence is from the share of labels that it gets right. top8_teacher_mass,
        top8_model_mass: what both give to the teacher's 8 likeliest tokens; top8_overlap: the share of the
        model's own 8 that are among them.
    """
    model.eval()
    seen: list[list[np.ndarray]] = [[] for _ in rows]
    with progress(title, len(rows), "rows") as advance:
        for indices in in_order(rows, min(4096, LOGITS // vocabulary)):
            batch = make_batch([rows[i] for i in indices])
            cuts = np.cumsum([len(rows[i].tokens) - rows[i].start for i in indices])[:-1]
            for column in _at_counted(model, teacher, batch, vocabulary):
                for i, part in zip(indices, np.split(column, cuts), strict=True):
                    seen[i].append(part)
            advance(len(indices))

    nll, mine, confidence, *compared = (np.concatenate(column) for column in zip(*seen, strict=True))
    lost, labels = nll.astype(np.float64), np.concatenate([row.tokens[row.start :] for row in rows])
    mean = float(lost.mean())
    result = {
        "nll": mean,
        "perplexity": perplexity(mean),
        "ece": calibration_error(confidence, mine == labels),
    }
    if text_bytes:
        result["bits_per_byte"] = float(lost.sum()) / math.log(2) / text_bytes
    if not compared:
        return result, [RowFidelity(one[0], None, one[1], None) for one in seen]
    divergence, theirs, *masses = compared
    divergence = divergence.astype(np.float64)
    result["kl"] = float(divergence.mean())
    result["kl_median"], result["kl_p95"] = map(float, np.quantile(divergence, (0.5, 0.95)))
    result["top1_agreement"] = float((mine == theirs).mean())
    for name, mass in zip(("teacher_mass", "model_mass", "overlap"), masses, strict=True):
        result[f"top{TOP}_{name}"] = float(mass.mean())
    return result, [RowFidelity(one[0], one[3], one[1], one[4]) for one in seen]


def perplexity(nll: float) -> float:
    """e to the mean nats a token; finite however bad a model is, so that JSON can hold it."""
    return math.exp(min(nll, 700.0))


def _at_counted(model: Any, teacher: LiveTeacher | None, batch: Batch, vocabulary: int) -> list[np.ndarray]:
    """What is seen at the N counted places of a batch, row after row: each (N,), float32 or int32.

    Returns:
        nll, the model's likeliest id, its probability; with a teacher also the KL, the teacher's likeliest
        id, and the three of `top_masses`.
    """
    log_q = log_softmax(model(batch.tokens)[..., :vocabulary])
    values = [
        -mx.take_along_axis(log_q, batch.labels[..., None], axis=-1).squeeze(-1),
        mx.argmax(log_q, axis=-1).astype(mx.int32),
        mx.exp(log_q.max(-1)),
    ]
    if teacher is not None:
        log_p = log_softmax(teacher.logits(batch.tokens))
        values.append(sum_last(mx.exp(log_p) * (log_p - log_q)))
        values.append(mx.argmax(log_p, axis=-1).astype(mx.int32))
        values += top_masses(log_q, top_of(log_p, min(TOP, vocabulary)))
    mx.eval(values)
    counted = np.array(batch.counted)
    return [np.array(value)[counted] for value in values]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean gap between confidence and the share that is right, over bins of confidence (Guo et al. 2017).

    Args:
        confidence: (N,) probability of the likeliest token.
        right: (N,) bool, whether that token was the label.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))
