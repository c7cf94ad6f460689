"""How well a model predicts held-out answers, and how near it stays to its teacher."""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Encoded, in_order, make_batch
from mlx_distill.losses.outcomes import top_masses, top_of
from mlx_distill.losses.targets import log_softmax
from mlx_distill.progress import Progress, silent
from mlx_distill.teacher import LiveTeacher

TOP = 8  # likeliest tokens whose masses and overlap are compared
BINS = 15  # of confidence, all equally wide, as in Guo et al. 2017
LOGITS = 2**26  # numbers of one model's logits held at once: 0.25 GiB in float32, in a few copies


def fidelity(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    teacher: LiveTeacher | None = None,
    text_bytes: int | None = None,
    title: str = "fidelity",
    progress: Progress = silent,
) -> dict[str, float]:
    """Measure a model on the counted labels of `rows`, the model in eval mode.

    Args:
        teacher: the distribution to compare with; None leaves out what is said of it.
        text_bytes: UTF-8 bytes of the counted text; None leaves out `bits_per_byte`.

    Returns:
        nll: nats a counted token. bits_per_byte. kl: mean KL(teacher || model) in nats a token, at
        temperature 1; kl_p95: its 95th percentile over tokens. top1_agreement: share of tokens at
        which both find the same token likeliest. ece: expected calibration error of the likeliest token
        (Guo et al. 2017, arXiv 1706.04599, equation 3, 15 bins): how far confidence is from the share
        of labels that it gets right. top8_teacher_mass, top8_model_mass: what both give to the teacher's
        8 likeliest tokens; top8_overlap: the share of the model's own 8 that are among them.
    """
    model.eval()
    nll: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    agree: list[np.ndarray] = []
    confidence: list[np.ndarray] = []
    right: list[np.ndarray] = []
    masses: list[list[np.ndarray]] = [[], [], []]
    plan = in_order(rows, min(4096, LOGITS // vocabulary))
    with progress(title, len(rows), "rows") as advance:
        for indices in plan:
            batch = make_batch([rows[i] for i in indices])
            log_q = log_softmax(model(batch.tokens)[..., :vocabulary])
            likeliest = mx.argmax(log_q, axis=-1)
            values = [
                mx.take_along_axis(log_q, batch.labels[..., None], axis=-1).squeeze(-1),
                mx.exp(log_q.max(-1)),
                likeliest == batch.labels,
            ]
            if teacher is not None:
                log_p = log_softmax(teacher.logits(batch.tokens))
                values.append((mx.exp(log_p) * (log_p - log_q)).sum(-1))
                values.append(mx.argmax(log_p, axis=-1) == likeliest)
                values += top_masses(log_q, top_of(log_p, min(TOP, vocabulary)))
            mx.eval(values)
            counted = np.array(batch.counted)
            for kept, value in zip((nll, confidence, right, kl, agree, *masses), values, strict=False):
                kept.append(np.array(value)[counted])
            advance(len(indices))

    lost = -np.concatenate(nll).astype(np.float64)
    result = {"nll": float(lost.mean()), "ece": calibration_error(*map(np.concatenate, (confidence, right)))}
    if text_bytes:
        result["bits_per_byte"] = float(lost.sum()) / math.log(2) / text_bytes
    if teacher is not None:
        divergence = np.concatenate(kl).astype(np.float64)
        result["kl"] = float(divergence.mean())
        result["kl_p95"] = float(np.quantile(divergence, 0.95))
        result["top1_agreement"] = float(np.concatenate(agree).mean())
        for name, mass in zip(("teacher_mass", "model_mass", "overlap"), masses, strict=True):
            result[f"top{TOP}_{name}"] = float(np.concatenate(mass).mean())
    return result


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean gap between confidence and the share that is right, over bins of confidence (Guo et al. 2017).

    Args:
        confidence: (N,) probability of the likeliest token.
        right: (N,) bool, whether that token was the label.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence.astype(np.float64) - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))
