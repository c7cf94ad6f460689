"""What was told apart, and the words and numbers in which a verdict says so."""

from collections.abc import Iterable, Mapping, Sequence
from math import floor, isclose, log10
from typing import Any, NamedTuple

from mlx_distill.metrics import METRICS, SCORES, Metric, Models, is_pruned, number

_VERDICTS = ("better", "worse", "no difference seen")


class Told(NamedTuple):
    """One of `comparisons` of evaluation.json."""

    metric: Metric
    problems: int
    difference: float  # model - other
    low: float | None  # None: too few problems
    high: float | None
    level: float
    verdict: str  # on the model: one of the three

    @property
    def apart(self) -> str:
        """ "63.8 points more, 95 % interval 60.9 to 66.6"."""
        if self.low is None or self.high is None:
            noun = self.noun if self.problems == 1 else f"{self.noun}s"
            return f"{self.problems} {noun} {'is' if self.problems == 1 else 'are'} too few to tell"
        if self.low == self.high == self.difference == 0:
            return "the same on every one"
        unit = " points" if self.metric.unit == "%" else f" {self.metric.unit}" if self.metric.unit else ""
        more, less = f"{unit} more", f"{unit} less"
        size = fine(self.metric, abs(self.difference))
        first = f"{size}{less if self.difference < 0 else more}" if self.difference else "the same"
        low, high = (fine(self.metric, abs(end)) for end in (self.low, self.high))
        if self.low < 0 < self.high:
            ends = f"{low} less to {high} more"
        elif self.verdict == "no difference seen":  # one end is 0
            ends = f"{low} less to {high}" if self.low < 0 else f"{low} to {high} more"
        else:
            ends = f"{high} to {low}" if self.difference < 0 else f"{low} to {high}"
        return f"{first}, {100 * self.level:g} % interval {ends}"

    @property
    def noun(self) -> str:
        return "problem" if self.metric in scores() else "row"

    @property
    def on(self) -> str:
        """ "on 1,000 problems"; nothing where `apart` says it."""
        return f"on {self.problems:,} {self.noun}s" if self.low is not None else ""


Pairs = Mapping[tuple[str, str, str], Told]  # (metric, model, other)


def read(comparisons: Sequence[Mapping[str, Any]], models: Models) -> Pairs:
    """What can be read of `comparisons`; what does not fit the models costs no report."""
    found = {}
    for one in comparisons:
        name, model, other = (str(one.get(key)) for key in ("metric", "model", "other"))
        problems, difference = number(one.get("problems")), number(one.get("difference"))
        low, high, level = (number(one.get(key)) for key in ("low", "high", "level"))
        metric = METRICS.get(name)
        if metric is None or None in (metric.measured(models.get(model)), metric.measured(models.get(other))):
            continue
        if problems and difference is not None and one.get("verdict") in _VERDICTS:
            ends = (None, None) if low is None or high is None else (low, high)
            level = 0.95 if level is None else level
            told = Told(metric, int(problems), difference, *ends, level, str(one["verdict"]))
            found[name, model, other] = told
    return found


def scores() -> list[Metric]:
    """The first score of each task that answers are written for."""
    names = dict.fromkeys(names[0] for task, names in SCORES.items() if task != "fidelity")
    return [METRICS[name] for name in names if name in METRICS]


def fine(metric: Metric, value: float) -> str:
    """`value` as the metric writes it, and with its first digit where that would be lost."""
    text = metric.write(value)
    if value and text == metric.write(0.0):
        value *= 100 if metric.unit == "%" else 1
        return f"{value:.{-floor(log10(value))}f}" if value > 1e-9 else "0"
    return text if value else "0"


def share(share: float) -> str:
    """0.9167 as "92 %"; never rounded up to 100 %, never down to 0 %."""
    digits = 0 if 0.095 <= share < 0.995 or share >= 1.005 or share == 1 else 1
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.{digits}f} %"


def share_of_parameters(models: Models) -> str:
    metric = METRICS["parameters"]
    mine, theirs = metric.measured(models.get("student")), metric.measured(models.get("teacher"))
    return share(mine / theirs) if mine and theirs else ""


def joined(parts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def before(models: Models) -> str:
    return "before healing" if is_pruned(models) else "before training"


def is_its_own_teacher(models: Models) -> bool:
    """Whether the teacher is the student before training, read off the numbers."""
    teacher, student = models.get("teacher", {}), models.get("student_before", {})
    kl = number(student.get("kl"))
    if kl is not None:
        return abs(kl) <= 1e-6
    names = ["parameters", "nll", *(metric.name for metric in scores())]
    pairs = [(number(teacher.get(name)), number(student.get(name))) for name in names]
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    return pairs[0] in both and len(both) > 1 and all(isclose(*pair, rel_tol=1e-6) for pair in both)
