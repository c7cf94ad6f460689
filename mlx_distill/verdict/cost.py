"""What is said of what the models cost to run: the student beside the teacher, and its smaller models."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.metrics import METRICS, Metric, Models, number, ordered
from mlx_distill.verdict.scores import differences
from mlx_distill.verdict.untold import gap
from mlx_distill.verdict.words import Pairs, joined, sentence, share

SIZE = METRICS["size_mib"]


def cheaper(models: Models) -> list[str]:
    """Speed, energy and bytes of the student by those of the teacher, where runs of both show a spread."""
    student, teacher = models["student"], models.get("teacher", {})
    speed = _ratio(METRICS["decode_tokens_per_second"], student, teacher)
    energy = _ratio(METRICS["joules_per_token"], student, teacher)
    parts = [f"decodes {_times(speed)}"] if speed else []
    if energy:
        parts.append(
            "takes as much energy a token" if energy == 1 else f"takes {share(energy)} of the energy a token"
        )
    mine, theirs = SIZE.measured(student), SIZE.measured(teacher)
    if parts and mine and theirs:
        parts.append(f"takes {share(mine / theirs)} of the bytes on disk")
    return [sentence(f"beside the teacher, the student {joined(parts)}")] if parts else []


def _ratio(metric: Metric, one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """`one` by `other`; 1 where they differ by no more than their spreads; None without these."""
    mine, theirs = metric.measured(one), metric.measured(other)
    spreads = [number(side.get(f"{metric.name}_spread")) for side in (one, other)]
    if not mine or not theirs or spreads[0] is None or spreads[1] is None:
        return None
    return 1.0 if abs(mine - theirs) <= spreads[0] + spreads[1] else mine / theirs


def _times(ratio: float) -> str:
    if ratio == 1:
        return "as many tokens a second (within their spread)"
    if ratio >= 1.5:
        return f"{ratio:.{1 if ratio < 10 else 0}f} times as many tokens a second"
    percent = 100 * abs(ratio - 1)
    return f"{percent:.{0 if percent >= 1 else 1}f} % {'more' if ratio > 1 else 'fewer'} tokens a second"


def smaller(metrics: Sequence[Metric], pairs: Pairs, models: Models) -> list[str]:
    """What each smaller model of the student takes and keeps: a line each, or one for three and more."""
    student, kl = models["student"], METRICS["kl"]
    lines, short = [], []
    for name in [name for name in ordered(models) if name.startswith("student-")]:
        model = models[name]
        parts, values = [], []
        mine, whole = SIZE.measured(model), SIZE.measured(student)
        if mine is not None:
            of = f" ({share(mine / whole)} of the student)" if whole else ""
            parts.append(f"takes {SIZE.text(model)}{of}")
            values.append(SIZE.text(model))
        judged = metrics or ([kl] if kl.measured(student) is not None else [])
        judged = [metric for metric in judged if metric.measured(model) is not None]
        told = [metric for metric in judged if (metric.name, name, "student") in pairs]
        parts += differences(
            "student", told, pairs, models, name, lambda metric, model=model: metric.text(model)
        )
        for metric in judged:
            found = pairs.get((metric.name, name, "student"))
            written = f"KL {kl.write(model['kl'])}" if metric is kl else f"{metric.text(model)} {metric.name}"
            values.append(f"{written} ({found.verdict}: {found.apart})" if found else written)
            if found is None and metric is kl:
                parts.append(f"has a KL to the teacher of {kl.text(model)}, {gap(kl, model, student)}")
            elif found is None:
                parts.append(f"scores {metric.text(model)} {metric.name}, {gap(metric, model, student)}")
        if parts:
            lines.append(f"{name} {joined(parts) if told else ' and '.join(parts)}.")
            short.append(f"{name} {', '.join(values)}")
    return lines if len(lines) < 3 else [f"Smaller models of it: {'; '.join(short)}."]
