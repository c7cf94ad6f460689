"""What is said of scores that were not compared problem by problem, as in runs of older versions.

A difference has its standard error where both sides have one, as if the two were independent, which is
cautious: they answer the same problems. It is called "within two standard errors" where it is.
"""

from collections.abc import Mapping
from typing import Any

from mlx_distill.metrics import Metric, Models, is_pruned
from mlx_distill.verdict.words import before, sentence, share, share_of_parameters


def untold_score(metric: Metric, models: Models) -> list[str]:
    student, teacher = models["student"], models.get("teacher")
    mine, theirs = metric.measured(student), metric.measured(teacher)
    assert mine is not None
    if theirs and teacher:
        part = mine / theirs
        at = f" at {cost} of its parameters" if (cost := share_of_parameters(models)) else ""
        first = (
            f"The student {'keeps' if part < 1 else 'reaches'} {share(part)} of the teacher's {metric.name}"
        )
        lines = [f"{first}{at}: {metric.text(student)} against {metric.text(teacher)}."]
    else:
        lines = [f"The student's {metric.name} is {metric.text(student)}."]
    baseline, untrained = models.get("baseline"), models.get("student_before")
    parts = []
    if baseline and metric.measured(baseline) is not None:
        found = gap(metric, baseline, student)
        end = ", so here the teacher did not help" if _clearly_better(metric, baseline, student) else ""
        article = "an" if metric.name[0] in "aeiou" else "a"
        reached = f"reaches {article} {metric.name} of {metric.text(baseline)}"
        how = (
            "pruned alike and trained on labels alone, it"
            if is_pruned(models)
            else "trained without the teacher, the same student"
        )
        parts.append(f"{how} {reached}, {found}{end}")
    if untrained and metric.measured(untrained) is not None:
        parts.append(f"{before(models)} its {metric.name} was {metric.text(untrained)}")
    return [*lines, *([sentence("; ".join(parts))] if parts else [])]


def gap(metric: Metric, one: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """ "63.8 ± 1.6 points less", seen from `one`."""
    difference, stderr = _difference(metric, one, student)
    unit = " points" if metric.unit == "%" else ""
    spread = f" ± {metric.write(stderr)}" if stderr is not None else ""
    if metric.write(abs(difference)) == metric.write(0.0):
        return "the same"
    within = ", within two standard errors" if stderr is not None and abs(difference) < 2 * stderr else ""
    return f"{metric.write(abs(difference))}{spread}{unit} {'less' if difference < 0 else 'more'}{within}"


def _clearly_better(metric: Metric, one: Mapping[str, Any], student: Mapping[str, Any]) -> bool:
    difference, stderr = _difference(metric, one, student)
    return difference > 2 * (stderr or 0.0)


def _difference(
    metric: Metric, one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[float, float | None]:
    """How far `one` lies above `other`, and the standard error of that."""
    mine, theirs = metric.measured(one), metric.measured(other)
    assert mine is not None and theirs is not None
    errors = metric.stderr(one), metric.stderr(other)
    if errors[0] is None or errors[1] is None:
        return mine - theirs, None
    return mine - theirs, (errors[0] ** 2 + errors[1] ** 2) ** 0.5
