"""Line charts as inline SVG: axes, ticks, several series, no script and no outside file.

Colours come from the page's style sheet (classes ``raw``, ``line``, ``points``), so one chart serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_DRAWN = 400
"""Points of a line that a screen can show; longer series are averaged down to about this many."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw: a faint raw line, the line to read, and single points."""

    title: str
    x_label: str
    raw: Sequence[Point] = ()
    line: Sequence[Point] = ()
    points: Sequence[Point] = field(default=())

    def svg(self) -> str:
        """The chart, or an empty string when no series has a finite point."""
        raw, line, points = (_finite(series) for series in (self.raw, self.line, self.points))
        everything = [*raw, *line, *points]
        if not everything:
            return ""
        x_low, x_high = _span([x for x, _ in everything])
        # The first few losses tower over the rest; scaled by them, the curve would be a flat line.
        tallest = [y for _, y in (*line, *points)] + _without_top([y for _, y in raw])
        ticks_y = nice_ticks(min(0.0, *tallest), max(tallest), 5)
        ticks_x = nice_ticks(x_low, x_high, 5)
        frame = _Frame(x_low, x_high, ticks_y[0], ticks_y[-1])
        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)}">',
            f"<title>{escape(self.title)}</title>",
            *(_y_tick(frame, tick) for tick in ticks_y),
            *(_x_tick(frame, tick) for tick in ticks_x if x_low <= tick <= x_high),
            f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">'
            f"{escape(self.x_label)}</text>",
            _path(frame, raw, "raw"),
            _path(frame, line, "line"),
            *(f'<circle class="points" cx="{x}" cy="{y}" r="3.2"/>' for x, y in map(frame.place, points)),
            "</svg>",
        ]
        return "".join(parts)


@dataclass(frozen=True)
class _Frame:
    """Maps values to places of the drawing; values above the frame are drawn at its upper edge."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, point: Point) -> Point:
        across = (point[0] - self.x_low) / (self.x_high - self.x_low)
        up = (min(point[1], self.y_high) - self.y_low) / (self.y_high - self.y_low)
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)


def smooth(points: Sequence[Point], weight: float = 0.95) -> list[Point]:
    """Exponential moving average, corrected for its start so that the first value is the first point itself.

    Points that are not finite are left out.
    """
    smoothed: list[Point] = []
    average = seen = 0.0
    for x, y in _finite(points):
        average = weight * average + (1 - weight) * y
        seen = weight * seen + (1 - weight)
        smoothed.append((x, average / seen))
    return smoothed


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that cover ``low`` to ``high`` in about ``count`` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: ``12k`` for twelve thousand, no trailing zeros."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:.4g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _span(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _without_top(values: Sequence[float]) -> list[float]:
    """All but the highest twentieth, when there are enough to tell."""
    return sorted(values)[: math.ceil(len(values) * 0.95)] if len(values) >= 40 else list(values)


def _thinned(points: list[Point]) -> list[Point]:
    """At most about ``_DRAWN`` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _DRAWN)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _path(frame: _Frame, points: list[Point], kind: str) -> str:
    placed = [frame.place(point) for point in _thinned(points)]
    if len(placed) < 2:
        return "".join(f'<circle class="{kind}" cx="{x}" cy="{y}" r="2"/>' for x, y in placed)
    (x, y), *_ = placed
    moves = "".join(f"l{after[0] - before[0]:.1f} {after[1] - before[1]:.1f}" for before, after in pairwise(placed))
    return f'<path class="{kind}" d="M{x} {y}{moves}"/>'


def _y_tick(frame: _Frame, value: float) -> str:
    _, y = frame.place((frame.x_low, value))
    line = f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>'
    return f'{line}<text class="axis" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{short(value)}</text>'


def _x_tick(frame: _Frame, value: float) -> str:
    x, _ = frame.place((value, frame.y_low))
    base = _HEIGHT - _BOTTOM
    line = f'<line class="tick" x1="{x}" y1="{base}" x2="{x}" y2="{base + 4}"/>'
    return f'{line}<text class="axis" x="{x}" y="{base + 17}" text-anchor="middle">{short(value)}</text>'
