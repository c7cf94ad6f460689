"""The figures of a report: how training went, and quality against what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_distill import metrics as m
from mlx_distill.errors import MissingExtra

_CURVES = (
    ("loss", "Training loss, nats/token"),
    ("valid_nll", "Validation nll, nats/token"),
    ("valid_kl", "Validation KL, nats/token"),
)
_QUALITY = ("exact_match", "accuracy", "rougeL", "top1_agreement", "kl", "nll")  # behind every pass@1
_SHORT = {"student_before": "before", "baseline": "baseline"}


class Log(NamedTuple):
    """One line of a figure of curves: a stage of a run's metrics.jsonl."""

    label: str
    color: int
    lines: list[dict[str, Any]]
    stage: str
    dashed: bool = False


class _Cost(NamedTuple):
    name: str  # "size"
    metric: str  # of METRICS, that it is read from
    axis: str
    per: str  # what quality is divided by


_COSTS = (
    _Cost("size", "size_mib", "MiB on disk", "MiB on disk"),
    _Cost("latency", "decode_tokens_per_second", "milliseconds a token", "millisecond a token"),
    _Cost("latency", "time_to_first_token_ms", "milliseconds to the first token", "millisecond"),
    _Cost("energy", "joules_per_token", "joules a token", "joule a token"),
)


def curves(logs: Sequence[Log]) -> list[dict[str, Any]]:
    """A figure of each loss that some stage has logged twice.

    Raises:
        MissingExtra: no matplotlib.
    """
    from mlx_distill import figures

    found = []
    for key, title in _CURVES:
        lines, said = [], []
        for log in logs:
            points = _points(log, key)
            if len(points) > 1:
                steps, values = list(points), list(points.values())
                lines.append(figures.Curve(log.label, log.color, steps, values, log.dashed))
                said.append(f"{log.label} from {values[0]:.3f} to {values[-1]:.3f} at step {steps[-1]:,.0f}")
        if lines:
            note = "Each minimises its own losses; compare on validation rows." if key == "loss" else ""
            found.append(
                {
                    "title": title,
                    "svg": figures.curves(key, lines),
                    "said": f"{title}: {'; '.join(said)}.",
                    "lines": lines,
                    "bars": [],
                    "note": note if len(lines) > 1 else "",
                }
            )
    return found


def _points(log: Log, key: str) -> dict[float, float]:
    """Step -> value. A resumed run writes some steps twice; the later line counts."""
    points = {}
    for line in log.lines:
        step, value = m.number(line.get("step")), m.number(line.get(key))
        if line.get("stage") == log.stage and step is not None and value is not None:
            points[step] = value
    return dict(sorted(points.items()))


def costs(models: m.Models, colors: Mapping[str, int], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Quality against size, latency and energy: a figure each, all with one upright axis.

    Of what was not measured it says why. Empty where fewer than two models have a quality and a size.

    Raises:
        MissingExtra: no matplotlib.
    """
    metric = _quality(models)
    if metric is None:
        return []
    made, drawn = [], {cost: _measured(cost, metric, models) for cost in _COSTS}
    seconds = {one.metric: one for one in _COSTS}
    # The time of a token where it was measured, else that to the first one.
    late = "decode_tokens_per_second"
    dropped = "time_to_first_token_ms" if len(drawn[seconds[late]][0]) > 1 else late
    shown = {cost: found for cost, found in drawn.items() if cost.metric != dropped}
    if all(len(points) < 2 for points, _ in shown.values()):
        return []
    span = _span(metric, [name for points, _ in shown.values() for name in points], models)
    for cost, (points, reasons) in shown.items():
        made.append(_figure(cost, metric, points, reasons, span, models, colors, names))
    return made


def _quality(models: m.Models) -> m.Metric | None:
    """The first metric that two models have."""
    first = [x for x in m.QUALITY if x.name.endswith("pass@1")]
    for metric in [*first, *(m.METRICS[name] for name in _QUALITY if name in m.METRICS)]:
        if sum(metric.measured(found) is not None for found in models.values()) > 1:
            return metric
    return None


def _measured(cost: _Cost, metric: m.Metric, models: m.Models) -> tuple[dict[str, float], list[str]]:
    """The cost of each model that has both, and why others are missing, as far as that is written."""
    found, missing = {}, dict[str, list[str]]()
    for name in m.ordered(models):
        value = m.number(models[name].get(cost.metric))
        if metric.measured(models[name]) is None:
            continue
        if value is not None and value > 0:
            found[name] = 1e3 / value if cost.metric == "decode_tokens_per_second" else value
        elif why := models[name].get(f"{cost.metric}_why"):
            missing.setdefault(str(why), []).append(m.label(name, models))
    if not found:  # for all of them it is the student's reason; controls say that they are like it
        first = ["student", *m.ordered(models)]
        whys = [models.get(name, {}).get(f"{cost.metric}_why") for name in first]
        return {}, [str(why) for why in whys if why][:1]
    return found, [f"{', '.join(of)}: {why}" for why, of in missing.items()]


def _span(metric: m.Metric, names: Sequence[str], models: m.Models) -> tuple[float, float]:
    """The upright axis that all figures share."""
    ends = []
    for name in names:
        value, stderr = metric.measured(models[name]), metric.stderr(models[name]) or 0.0
        assert value is not None
        ends += [_scaled(metric, value - stderr), _scaled(metric, value + stderr)]
    low, high = min(ends), max(ends)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _scaled(metric: m.Metric, value: float) -> float:
    return 100 * value if metric.unit == "%" else value


def _figure(
    cost: _Cost,
    metric: m.Metric,
    found: Mapping[str, float],
    reasons: Sequence[str],
    span: tuple[float, float],
    models: m.Models,
    colors: Mapping[str, int],
    names: Mapping[str, str],
) -> dict[str, Any]:
    from mlx_distill import figures

    shown = metric.name.replace("_", " ")
    made: dict[str, Any] = {"title": f"{shown} against {cost.name}", "lines": [], "svg": "", "said": ""}
    made |= {"bars": [], "per": "", "note": "; ".join(reasons)}
    if len(found) < 2:
        why = "; ".join(reasons) or f"{'fewer than two models have' if found else 'nobody measured'} it"
        return made | {"note": f"Not drawn: {why}."}
    points = []
    for name, at in found.items():
        value, stderr = metric.measured(models[name]), metric.stderr(models[name]) or 0.0
        assert value is not None
        label = names.get(name, name)
        points.append(
            figures.Point(label, colors.get(name, 4), at, _scaled(metric, value), _scaled(metric, stderr))
        )
    quality = f"{shown} {metric.unit}".strip()
    said = "; ".join(f"{p.label} {m.three_digits(p.quality)} at {m.three_digits(p.size)}" for p in points)
    made["svg"] = figures.sizes(cost.name, points, quality, cost.axis, span=span, narrow=True)
    made["said"] = f"{quality} against {cost.axis}: {said}."
    if metric.better == "higher" and min(point.quality for point in points) >= 0:
        made["bars"] = _bars(points)
        made["per"] = f"{'points of ' if metric.unit == '%' else ''}{shown} a {cost.per}"
    return made


def _bars(points: Sequence[Any]) -> list[dict[str, Any]]:
    """Quality by cost, the best first."""
    ranked = sorted(points, key=lambda point: -point.quality / point.size)
    most = ranked[0].quality / ranked[0].size or 1.0
    return [
        {
            "label": point.label,
            "color": point.color,
            "width": f"{100 * point.quality / point.size / most:.1f}",
            "text": m.three_digits(point.quality / point.size),
        }
        for point in ranked
    ]


def short_names(models: m.Models) -> dict[str, str]:
    """Names of models that fit into a figure."""
    before = "pruned" if m.is_pruned(models) else "before"
    return {name: name for name in models} | {**_SHORT, "student_before": before}


def drawn(make: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures that `make` draws; without matplotlib none, and what to install."""
    from mlx_distill.report_page import NO_MATPLOTLIB

    try:
        return make(), []
    except MissingExtra:
        return [], [NO_MATPLOTLIB]
