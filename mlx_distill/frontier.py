"""Which of several models to take: quality against size, latency and energy, and the smallest good enough.

The arithmetic alone; `compress.py` makes the models and `report_frontier.py` the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_distill import metrics as m
from mlx_distill.metrics import SCORES, Metric, Models

COSTS = {"size": "size_gib", "latency": "ms_per_token", "energy": "joules_per_token"}
SIZE = Metric("size_gib", "weights on disk", "GiB", "lower", lambda value: f"{value:.3g}")
LATENCY = Metric("ms_per_token", "of an answer, after its first", "", "lower", m.three_digits)
METRICS = m.METRICS | {metric.name: metric for metric in (SIZE, LATENCY)}


class Measured(NamedTuple):
    """What one run measured."""

    run: str
    models: Models
    ratio: float | None = None  # `student.prune.ratio`
    teacher: str | None = None  # which one it is; runs of one teacher show it once


class Point(NamedTuple):
    """One model that could be taken."""

    run: str
    model: str  # as in evaluation.json
    ratio: float | None  # of the run
    metrics: dict[str, Any]  # as METRICS of evaluation.json: None has its `NAME_why`

    @property
    def name(self) -> str:
        return self.model if self.model == "teacher" else f"{self.run} {self.model}"


class Frontier(NamedTuple):
    """All models, where the line is, and what that makes of them."""

    score: str  # the metric that is quality here
    share: float  # of the teacher's that is good enough
    line: float | None  # that score; None where the teacher has none
    points: list[Point]  # the teacher first
    front: dict[str, list[bool | None]]  # by cost: whether a point is on it; None: it was not measured
    pick: int | None  # the smallest of the students at or above the line
    closest: int | None  # the best student, where none is

    @property
    def teacher(self) -> Point | None:
        return next((point for point in self.points if point.model == "teacher"), None)


def frontier(runs: Sequence[Measured], score: str, share: float) -> Frontier:
    """Put the models of several runs side by side.

    Args:
        score: of which more is better. share: of the first run's teacher's.
    """
    points, seen = list[Point](), set[str | None]()
    for run in runs:
        for model in m.ordered(run.models):
            is_teacher = model == "teacher"
            if (is_teacher and run.teacher not in seen) or model == "student" or model.startswith("student-"):
                ratio = None if is_teacher else run.ratio
                points.append(Point(run.run, model, ratio, _metrics(model, run.models[model], score)))
            if is_teacher:
                seen.add(run.teacher)
    points.sort(key=lambda point: point.model != "teacher")
    front = {
        cost: on_front([(m.number(p.metrics[field]), m.number(p.metrics[score])) for p in points])
        for cost, field in COSTS.items()
    }
    teacher = next((p for p in points if p.model == "teacher"), None)
    whole = m.number(teacher.metrics[score]) if teacher else None
    line = share * whole if whole else None
    students = [
        (i, size, value)
        for i, point in enumerate(points)
        if point.model != "teacher"
        and (size := m.number(point.metrics["size_gib"])) is not None
        and (value := m.number(point.metrics[score])) is not None
    ]
    above = [one for one in students if line is not None and one[2] >= line - 1e-12]
    pick = min(above, key=lambda one: (one[1], -one[2]))[0] if above else None
    closest = max(students, key=lambda one: (one[2], -one[1]))[0] if students and not above else None
    return Frontier(score, share, line, points, front, pick, closest)


def on_front(points: Sequence[tuple[float | None, float | None]]) -> list[bool | None]:
    """Which of these (cost, quality) no other beats: in one of the two, and at least equals in the other.

    Returns:
        None for a point of which one of the two is not known.
    """
    found: list[bool | None] = [None] * len(points)
    known = [
        (cost, -quality, i)
        for i, (cost, quality) in enumerate(points)
        if cost is not None and quality is not None
    ]
    best, best_cost = float("inf"), float("-inf")  # of the quality, negated; and what that cost
    for cost, worse, i in sorted(known):
        found[i] = worse < best or (worse == best and cost == best_cost)
        if worse < best:
            best, best_cost = worse, cost
    return found


def sentence(found: Frontier) -> str:
    """The pick and what it costs, or that none is good enough and which comes closest."""
    score, teacher = METRICS[found.score], found.teacher
    best = found.pick if found.pick is not None else found.closest
    if best is None or teacher is None or found.line is None:
        lacking = "no student has a" if best is None else "the teacher has no positive"
        why = f"{lacking} {found.score}"
        return f"Nothing can be picked: {why}."
    wanted = f"{m.percent(found.share).removesuffix('.0')} % of the teacher's {found.score}"
    limit = f"({score.write(found.line)}{f' {score.unit}' if score.unit else ''})"
    point = found.points[best]
    got, cost = f"{found.score} {score.text(point.metrics)}", _costs(point, teacher)
    if found.pick is None:
        return f"No model reaches {wanted} {limit}; {point.name} comes closest: {got}, {cost}."
    value, stderr = score.measured(point.metrics), score.stderr(point.metrics)
    spread = ((stderr or 0.0) ** 2 + (found.share * (score.stderr(teacher.metrics) or 0.0)) ** 2) ** 0.5
    assert value is not None
    near = "; its score is within two standard errors of the line" if value - found.line < 2 * spread else ""
    return f"The smallest model with {wanted} {limit} is {point.name}: {got}, {cost}{near}."


def _costs(point: Point, teacher: Point) -> str:
    """Size, latency and energy of a model, as far as they were measured."""
    size, whole = (m.number(one.metrics["size_gib"]) for one in (point, teacher))
    assert size is not None
    parts = [size_text(size) + (f" ({100 * size / whole:.3g} % of the teacher)" if whole else "")]
    for metric, words in ((LATENCY, "ms a token"), (METRICS["joules_per_token"], "J a token")):
        value = metric.measured(point.metrics)
        parts += [] if value is None else [f"{metric.write(value)} {words}"]
    return ", ".join(parts)


def size_text(gib: float) -> str:
    """GiB, or MiB where that reads better."""
    return f"{m.three_digits(gib)} GiB" if gib >= 1 else f"{m.three_digits(1024 * gib)} MiB"


def _metrics(model: str, found: Mapping[str, Any], score: str) -> dict[str, Any]:
    """The numbers of a model that the frontier is about, each null with its reason."""
    chosen: dict[str, Any] = {}

    def put(name: str, value: float | None, of: str | None = None, what: str | None = None) -> None:
        chosen[name] = value
        if value is None:
            why = found.get(f"{of or name}_why") or f"its {what or name} was not measured"
            chosen[f"{name}_why"] = str(why)

    size, speed = m.number(found.get("size_mib")), m.number(found.get("decode_tokens_per_second"))
    put("parameters", m.number(found.get("parameters")))
    put("size_gib", None if size is None else size / 1024, "size_mib", "size")
    # The teacher's first choices are its own.
    own = {"top1_agreement": 1.0} if model == "teacher" and score == "top1_agreement" else {}
    for name in dict.fromkeys([score, *(name for names in SCORES.values() for name in names)]):
        if name == score or name in found:
            put(name, m.number({**found, **own}.get(name)))
            if f"{name}_stderr" in found:
                chosen[f"{name}_stderr"] = found[f"{name}_stderr"]
    for name in ("kl", "bits_per_weight", "sparsity"):
        if name in found:
            put(name, m.number(found[name]))
    put("decode_tokens_per_second", speed, what="speed")
    put("ms_per_token", 1e3 / speed if speed else None, "decode_tokens_per_second", "speed")
    put("joules_per_token", m.number(found.get("joules_per_token")), what="energy")
    return chosen
