"""The figures of a report, as SVG text that stands in the page itself.

Colours are named by the page (`var(--c0)` ...), so one figure reads on light and on dark, and no text is
turned into paths, so it has the page's font. matplotlib is an extra: each function raises `MissingExtra`
without it.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mlx_distill.errors import MissingExtra

_NARROW, _WIDE = (3.5, 2.7), (4.6, 2.9)  # inches: three beside each other on a page, or two

# matplotlib knows no CSS variables: it draws in stand-in colours, which are replaced in its SVG.
_INK, _FAINT, _LINE = "#0000fa", "#0000fb", "#0000fc"
_STAND_INS = {_INK: "currentColor", _FAINT: "var(--faint)", _LINE: "var(--line)"}
_STAND_INS |= {f"#0001{index:02x}": f"var(--c{index})" for index in range(8)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
}


class Curve(NamedTuple):
    """One line of a figure."""

    label: str
    color: int  # 0 to 7, the page's `--c0` to `--c7`
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False


class Point(NamedTuple):
    """One model: how big, how good, and the standard error of the latter."""

    label: str
    color: int
    size: float
    quality: float
    stderr: float = 0.0
    ring: bool = False  # drawn around it, to single it out
    named: Literal["always", "if there is room", "never"] = "always"


def curves(name: str, lines: Sequence[Curve]) -> str:
    """Values over steps, as SVG. The scale is logarithmic where they span more than a factor of 30.

    Args:
        name: makes the ids inside the SVG its own; several figures share a page.
    """
    with _style():
        return _curves(name, lines)


def sizes(
    name: str,
    points: Sequence[Point],
    quality: str,
    size: str,
    *,
    front: Sequence[Point] = (),
    line: float | None = None,
    span: tuple[float, float] | None = None,
    narrow: bool = False,
) -> str:
    """Quality over size, or another cost, on a logarithmic scale, as SVG.

    Args:
        quality: title of the upright axis. size: title of the level one.
        front: points that no other beats, the cheapest first: a step leads from each to the next.
        line: a quality that is good enough, drawn across.
        span: of the upright axis, where several figures share one; None: as the points have it.
        narrow: for three figures beside each other.
    """
    with _style():
        return _sizes(name, points, quality, size, front, line, span, narrow)


def _style() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("figures need matplotlib: pip install 'mlx-distill[report]'") from None
    return matplotlib.rc_context(_STYLE)


def _curves(name: str, lines: Sequence[Curve]) -> str:
    figure, axes = _axes(*_NARROW)
    values = [value for line in lines for value in line.values]
    log = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    if log:
        axes.set_yscale("log")
    for line in lines:
        style = (0, (3, 2)) if line.dashed else "solid"
        marker = "o" if len(line.steps) < 12 else ""
        axes.plot(
            line.steps,
            line.values,
            color=_color(line.color),
            linestyle=style,
            linewidth=1.6,
            marker=marker,
            markersize=3.5,
        )
    axes.set_xlabel("step")
    _plain_ticks(axes.xaxis)
    if log:
        _plain_ticks(axes.yaxis, log=True)
    return _svg(figure, name)


def _sizes(
    name: str,
    points: Sequence[Point],
    quality: str,
    size: str,
    front: Sequence[Point],
    line: float | None,
    span: tuple[float, float] | None,
    narrow: bool,
) -> str:
    figure, axes = _axes(*(_NARROW if narrow else _WIDE))
    axes.set_xscale("log")
    smallest, largest = min(point.size for point in points), max(point.size for point in points)
    margin = max(1.5, (largest / smallest) ** 0.15)
    axes.set_xlim(smallest / margin, largest * margin)
    _plain_ticks(axes.xaxis, log=True, few=narrow)
    if front:
        costs, best = [point.size for point in front], [point.quality for point in front]
        axes.step([*costs, largest * margin], [*best, best[-1]], where="post", color=_FAINT, linewidth=1.2)
    if line is not None:
        axes.axhline(line, color=_INK, linestyle=(0, (3, 2)), linewidth=1.0)
    for point in points:
        if point.ring:
            axes.plot([point.size], [point.quality], "o", mfc="none", mec=_INK, markersize=14)
        axes.errorbar(
            [point.size],
            [point.quality],
            yerr=[point.stderr] if point.stderr else None,
            color=_color(point.color),
            fmt="o",
            markersize=7,
            elinewidth=1.2,
        )
    axes.margins(y=0.15)
    if span is not None:
        axes.set_ylim(*span)
    axes.set_xlabel(size)
    axes.set_ylabel(quality)
    _label(figure, axes, points)
    return _svg(figure, name)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure as wide as a phone's page, outside pyplot's global list of figures.

    The page stretches it to its column. 4.6 inches are 331 units, so text of 9.5 is 9 pixels and more in a
    column of 320 pixels, which is what a phone has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures text; attaches itself
    axes = figure.add_subplot()
    axes.tick_params(length=3)
    axes.set_axisbelow(True)
    return figure, axes


def _label(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Write each name beside its point, on the first side where it covers nothing."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    taken = []
    for point in points:
        x, y = axes.transData.transform((point.size, point.quality))
        taken.append((x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale))
    named = [point for point in points if point.named != "never"]
    for point in sorted(named, key=lambda point: (point.named != "always", -point.quality)):
        sides = [(9, 0, "left"), (-9, 0, "right"), (0, 13, "center"), (0, -13, "center")]
        sides += [(9, -11, "left"), (-9, -11, "right"), (9, 11, "left"), (-9, 11, "right")]
        for place, (right, up, align) in enumerate(sides):
            text = axes.annotate(
                point.label,
                (point.size, point.quality),
                (right, up),
                textcoords="offset points",
                ha=align,
                va="center",
                color=_INK,
                annotation_clip=False,
            )
            # The layout must not make room for a name, or the points would move under it.
            text.set_in_layout(False)
            box = text.get_window_extent(figure.canvas.get_renderer()).padded(2 * scale)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            free = all(box.x1 < a or box.x0 > c or box.y1 < b or box.y0 > d for a, b, c, d in taken)
            if (inside and free) or (place == len(sides) - 1 and point.named == "always"):
                taken.append((box.x0, box.y0, box.x1, box.y1))
                break
            text.remove()


def _plain_ticks(axis: Any, log: bool = False, few: bool = False) -> None:
    """Ticks as people write numbers: 0.05, 20, 1,000; never 10 to a power."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log:
        low, high = axis.get_view_interval()
        wide = low > 0 and math.log10(high / low) > (1.2 if few else 2.5)
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _color(index: int) -> str:
    return f"#0001{index % 8:02x}"


def _svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element: its own ids, the page's colours, no date and no outside link."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    for stand_in, color in _STAND_INS.items():
        svg = svg.replace(stand_in, color)
    # Sized by the page, which says in words what is drawn. The namespace of links is no longer needed where
    # HTML holds the SVG.
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true" focusable="false">',
        svg,
        count=1,
    )
    return svg.replace("xlink:href", "href")
