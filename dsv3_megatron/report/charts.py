"""Charts as inline SVG. Colours are CSS variables, so that one drawing serves light and dark screens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from dsv3_megatron.report.thinning import Point
from parallel.units import show_count

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 82, 12, 10, 26
_MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A named line. ``kind``: line, dots, or area (stacked on the areas before it)."""

    name: str
    points: Sequence[Point]
    kind: str = "line"


@dataclass(frozen=True)
class Chart:
    """Series over one x axis, with marks: (x, what happened there)."""

    series: Sequence[Series]
    x_name: str
    y_name: str
    show: Callable[[float], str] = show_count
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    from_zero: bool = False
    logarithmic: bool = False


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Return at most ``2 * most`` points: each bucket's lowest and highest, so that no spike is lost."""
    if len(points) <= 2 * most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    kept: list[Point] = []
    for start, end in pairwise(edges):
        bucket = points[start:end]
        low, high = min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])
        kept += [low] if low == high else sorted((low, high))
    return kept


def draw(chart: Chart) -> str:
    """Return the chart as an SVG element; a sentence where no series has a point."""
    series = [Series(s.name, _finite(s.points, chart.logarithmic), s.kind) for s in chart.series]
    series = [s for s in series if s.points]
    if not series:
        return '<p class="none">not measured in this run</p>'
    series = _stacked(series)
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_of = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, high = (0.0 if chart.from_zero or any(s.kind == "area" for s in series) else min(ys)), max(ys)
    number = math.log10 if chart.logarithmic else float
    y_of_number = _scale(number(low), number(high), _HEIGHT - _BOTTOM, _TOP)
    y_of = lambda y: y_of_number(number(y))  # noqa: E731
    label = f"{chart.y_name} by {chart.x_name}: {', '.join(s.name for s in series)}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _grid(low, high, y_of, chart) + _x_labels(min(xs), max(xs), x_of, chart.x_name)
    for number_of, one in enumerate(series):
        parts.append(_shape(one, number_of, x_of, y_of, y_of(low), chart))
    for x, what in chart.marks:
        if min(xs) <= x <= max(xs):
            at = f"{x_of(x):.1f}"
            parts.append(
                f'<path class="mark" d="M{at} {_TOP}V{_HEIGHT - _BOTTOM}"><title>{escape(what)}</title></path>'
            )
    parts.append("</svg>")
    return "".join(parts) + _legend(series, chart)


def _finite(points: Sequence[Point], positive: bool) -> list[Point]:
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(y) and (y > 0 or not positive)]
    return thinned(kept)


def _stacked(series: list[Series]) -> list[Series]:
    """Return areas with the heights of those below added; the tallest first, so that lower ones paint over it."""
    below: dict[float, float] = {}
    areas = []
    for one in (s for s in series if s.kind == "area"):
        points = [(x, y + below.get(x, 0.0)) for x, y in one.points]
        below.update(points)
        areas.append(Series(one.name, points, "area"))
    return [*reversed(areas), *(s for s in series if s.kind != "area")]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    middle = 0.5 if high == low else 0.0
    return lambda value: start + ((value - low) / span + middle) * (end - start)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _grid(low: float, high: float, y_of: Callable[[float], float], chart: Chart) -> list[str]:
    ticks = _ticks(low, high)
    if chart.logarithmic and high / low > 20:
        ticks = [10.0**p for p in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    parts = []
    for tick in ticks:
        y = f"{y_of(tick):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{escape(short(chart.show(tick)))}</text>')
    return parts


def short(number: str) -> str:
    """Return a number's text without what an axis has no room for on a phone: 4.00e-03 is 4e-3, 7.000 is 7."""
    number = re.sub(r"(\.\d*?)0+(?=e|$)", r"\1", number)
    number = re.sub(r"\.(?=e|$)", "", number)
    return re.sub(r"e([+-])0*(\d*)$", lambda e: f"e{e[1].strip('+')}{e[2]}" if e[2] else "", number)


def _x_labels(low: float, high: float, x_of: Callable[[float], float], name: str) -> list[str]:
    y = _HEIGHT - 8
    ticks = [t for t in _ticks(low, high) if x_of(t) < _WIDTH - 90] or [low]
    parts = [f'<text x="{x_of(t):.1f}" y="{y}" text-anchor="middle">{show_count(t)}</text>' for t in ticks]
    return [*parts, f'<text x="{_WIDTH - _RIGHT}" y="{y}" text-anchor="end">{escape(name)}</text>']


def _shape(
    one: Series, number: int, x_of: Callable[[float], float], y_of: Callable[[float], float], floor: float, chart: Chart
) -> str:
    places = [(x_of(x), y_of(y)) for x, y in one.points]
    if one.kind == "dots":
        dots = (
            f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>'
            f"{escape(one.name)} {chart.show(v)} at {show_count(at)}</title></circle>"
            for (x, y), (at, v) in zip(places, one.points)
        )
        return "".join(dots)
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    if one.kind == "area":
        return f'<path class="a{number}" d="M{places[0][0]:.1f} {floor:.1f}L{line}L{places[-1][0]:.1f} {floor:.1f}Z"/>'
    if len(places) == 1:
        return f'<circle class="s{number}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
    return f'<path class="l{number}" d="M{line}"/>'


def _legend(series: list[Series], chart: Chart) -> str:
    items = []
    for number, one in enumerate(series):
        last = "" if one.kind == "area" else f" <b>{escape(chart.show(one.points[-1][1]))}</b>"
        items.append(f'<span><i class="k{number}"></i>{escape(one.name)}{last}</span>')
    return f'<div class="legend">{"".join(items)}<span class="unit">{escape(chart.y_name)}</span></div>'


def heat_map(rows: Sequence[Sequence[float]], row_name: str, column_name: str) -> str:
    """Return loads as a picture: a row per layer, a column per expert, each value over its row's mean.

    Nine levels from nothing to twice the mean and more; each level is one path, so that 58 x 256 cells stay small.
    """
    if not rows:
        return '<p class="none">this model has no experts, or their load was not recorded yet</p>'
    columns = max(len(row) for row in rows)
    levels: list[list[str]] = [[] for _ in range(9)]
    for y, row in enumerate(rows):
        mean = (sum(row) / len(row)) or 1.0
        for x, value in enumerate(row):
            levels[min(8, round(4 * value / mean))].append(f"M{x} {y}h1v1h-1z")
    paths = "".join(f'<path class="h{n}" d="{"".join(cells)}"/>' for n, cells in enumerate(levels) if cells)
    key = "".join(f'<i class="h{n}"></i>' for n in range(9))
    high = max(1, min(len(rows), 64)) * (24 if len(rows) < 12 else 6)
    return (
        f'<svg class="heat" viewBox="0 0 {columns} {len(rows)}" preserveAspectRatio="none" style="height:{high}px" '
        f'role="img" aria-label="load of every expert over the mean of its layer">{paths}</svg>'
        f'<div class="legend"><span>{len(rows)} {escape(row_name)} down, {columns} {escape(column_name)} across</span>'
        f'<span class="unit">0 {key} 2x the mean and more</span></div>'
    )
