"""What a run showed, in plain sentences that say no more than its numbers do."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.metrics import Models, label
from mlx_distill.verdict import words
from mlx_distill.verdict.cost import cheaper, smaller
from mlx_distill.verdict.distance import divergence, healed
from mlx_distill.verdict.scores import compared, told_scores
from mlx_distill.verdict.untold import untold_score

__all__ = ["verdict"]


def verdict(models: Models, comparisons: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """The sentences, most important first; one at least.

    Args:
        comparisons: of evaluation.json. Of two models that were compared, one is called better or worse
            where that was found, with the interval of the difference; without them (runs of older
            versions) nothing is, and a difference stands with its standard error.
    """
    student = models.get("student")
    if student is None:
        return ["No student was evaluated; the table below holds what was."]
    pairs = words.read(comparisons, models)
    scores = [metric for metric in words.scores() if metric.measured(student) is not None]
    told = [metric for metric in scores if compared(metric, pairs)]
    lines = told_scores(told, pairs, models)
    for metric in scores:
        lines += untold_score(metric, models) if metric not in told else []
    lines += cheaper(models)
    lines += divergence(pairs, models, bool(scores))
    lines += healed(models)
    lines += smaller(scores, pairs, models)
    lines += _decoded(models)
    if lines and "teacher" in models and "baseline" not in models:
        lines.append("No baseline was trained, so nothing here shows what the teacher added.")
    return lines or ["No score of the student was measured; the table below holds what was."]


def _decoded(models: Models) -> list[str]:
    """At which temperatures the answers were drawn, where each model has its own."""
    tuned = {name: found for name, found in models.items() if found.get("tuned")}
    if not tuned:
        return []
    tried = list(dict.fromkeys(t for found in tuned.values() for t in found["tuned"]))
    chosen = ", ".join(f"{label(name)} {found['temperature']:g}" for name, found in tuned.items())
    among = f"{', '.join(tried[:-1])} and {tried[-1]}" if len(tried) > 1 else tried[0]
    return [f"Each model answers at its own best of the temperatures {among} on validation rows: {chosen}."]
