"""What is said of scores that were compared problem by problem: each difference with its interval."""

from collections.abc import Callable, Sequence

from mlx_distill.metrics import Metric, Models, is_pruned
from mlx_distill.verdict.words import (
    Pairs,
    Told,
    before,
    is_its_own_teacher,
    joined,
    sentence,
    share,
    share_of_parameters,
)


def told_scores(metrics: Sequence[Metric], pairs: Pairs, models: Models) -> list[str]:
    """What the student keeps, whether there was anything to keep, and what it is better than."""
    if not metrics:
        return []
    lines = [_kept(metrics, pairs, models), *nothing_to_distil(metrics, pairs, models)]
    against = []
    if "baseline" in models:
        whom = (
            "the same student pruned alike and trained on labels alone"
            if is_pruned(models)
            else "the same student trained without the teacher"
        )
        found = differences("baseline", metrics, pairs, models)
        against += [f"against {whom}, it {joined(found)}{_helped(metrics, pairs)}"] if found else []
    if not is_its_own_teacher(models):  # else `_kept` says it
        found = differences("student_before", metrics, pairs, models)
        against += [f"against itself {before(models)}, it {joined(found)}"] if found else []
    return [*lines, *([sentence("; ".join(against))] if against else [])]


def _kept(metrics: Sequence[Metric], pairs: Pairs, models: Models) -> str:
    """The first sentence: what share of the teacher's scores the student has."""
    student, teacher = models["student"], models.get("teacher", {})
    own = is_its_own_teacher(models)
    parts, shares, alone = [], [], []
    for metric in metrics:
        mine, theirs = metric.measured(student), metric.measured(teacher)
        assert mine is not None
        told = pairs.get((metric.name, "student", "teacher"))
        gap = _gap(told) if told else "not compared"
        if not theirs:
            beside = "" if theirs is None else f" against the teacher's {metric.text(teacher)} ({gap})"
            alone.append(f"{metric.name} is {metric.text(student)}{beside}")
            continue
        whose = "of its" if parts else "of its own" if own else "of the teacher's"
        values = f"{metric.text(student)} against {metric.text(teacher)}"
        shares.append(mine / theirs)
        parts.append((f"{share(mine / theirs)} {whose} {metric.name}", values, gap))
    if not parts:
        return f"The student's {joined(alone)}."
    verb = "keeps" if all(one < 1 for one in shares) else "reaches"
    cost = "" if own else share_of_parameters(models)
    if len(parts) == 1:
        at = f" {before(models)}, when it was its own teacher" if own else ""
        at += f" at {cost} of its parameters" if cost else ""
        line = f"The student {verb} {parts[0][0]}{at}: {parts[0][1]} ({parts[0][2]})"
    else:
        at = f"At {cost} of the parameters, the" if cost else "The"
        line = f"{at} student {verb} {joined(f'{what} ({values}; {gap})' for what, values, gap in parts)}"
        line += f" {before(models)}, when it was its own teacher" if own else ""
    return f"{line}{f'; its {joined(alone)}' if alone else ''}."


def _gap(told: Told) -> str:
    """What stands behind the two values: the difference, its interval, and how many problems."""
    seen = "no difference seen: " if told.verdict == "no difference seen" and told.on else ""
    return f"{seen}{told.apart}{f', {told.on}' if told.on else ''}"


def nothing_to_distil(metrics: Sequence[Metric], pairs: Pairs, models: Models) -> list[str]:
    """A line where the teacher itself was not seen to be better than the student before training.

    A student that is its own teacher is equal to it by construction, and gets none.
    """
    if is_its_own_teacher(models):
        return []
    found: dict[str, list[str]] = {}
    for metric in metrics:
        told = pairs.get((metric.name, "teacher", "student_before"))
        if told is None or told.verdict == "better" or told.low is None:
            continue
        teacher, student = models["teacher"], models["student_before"]
        values = f"{metric.text(teacher)} against {metric.text(student)}; {told.apart}, {told.on}"
        found.setdefault(told.verdict, []).append(f"{metric.name} ({values})")
    words = {"worse": "is worse than", "no difference seen": "shows no difference from"}
    parts = [
        f"the teacher {words[verdict]} the student {before(models)} in {joined(found[verdict])}"
        for verdict in words
        if verdict in found
    ]
    perhaps = "" if "worse" in found else "perhaps "
    return [sentence(f"{perhaps}nothing to distil: {'; '.join(parts)}")] if parts else []


def differences(
    other: str,
    metrics: Sequence[Metric],
    pairs: Pairs,
    models: Models,
    model: str = "student",
    beside: Callable[[Metric], str] | None = None,
) -> list[str]:
    """How `model` differs from `other`, a predicate each: ["is better in pass@1 (...)", ...].

    Args:
        beside: the value that stands with a metric; None: that of `other`.
    """
    beside = beside or (lambda metric: metric.text(models[other]))
    found: dict[str, list[str]] = {}
    for metric in metrics:
        told = pairs.get((metric.name, model, other))
        if told is None:
            continue
        verdict = told.verdict if told.low is not None else "too few"
        said = (metric.name, "student", "teacher") in pairs  # on how many, in the first sentence
        count = f", {told.on}" if told.on and not said else ""
        found.setdefault(verdict, []).append(f"{metric.name} ({beside(metric)}; {told.apart}{count})")
    words = {
        "better": "is better in",
        "worse": "is worse in",
        "no difference seen": "shows no difference in",
        "too few": "cannot be told apart in",
    }
    return [f"{words[verdict]} {joined(found[verdict])}" for verdict in words if verdict in found]


def _helped(metrics: Sequence[Metric], pairs: Pairs) -> str:
    """What a baseline that is no worse says of the teacher."""
    told = {metric.name: pairs.get((metric.name, "student", "baseline")) for metric in metrics}
    verdicts = {name: one.verdict for name, one in told.items() if one is not None and one.low is not None}
    worse = [name for name, verdict in verdicts.items() if verdict == "worse"]
    unseen = [name for name, verdict in verdicts.items() if verdict == "no difference seen"]
    if worse and len(worse) == len(told):
        return ", so here the teacher did not help"
    if unseen and len(unseen) == len(told):
        return ", so nothing here shows that the teacher helped"
    words = [f", so in {joined(worse)} the teacher did not help"] if worse else []
    if unseen:
        words.append(
            f", {'and' if worse else 'so'} in {joined(unseen)} nothing shows that the teacher helped"
        )
    return "".join(words)


def compared(metric: Metric, pairs: Pairs) -> bool:
    """Whether the student was compared with another model in this metric."""
    return any(name == metric.name and model == "student" for name, model, _ in pairs)
