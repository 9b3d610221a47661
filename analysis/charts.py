"""Charts of analysis/report.py as SVG text: no library, colours by the page's style sheet.

Each has a title and a description for screen readers; the page sets a table beside it.
"""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT = 460, 260  # user units, which are px at full size
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 44  # margins
LINE_STYLES = 8  # classes line0..line7 of the page: a colour and a dash each


def nice_ticks(low: float, high: float, about: int = 5) -> np.ndarray:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    rough = (high - low) / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6)
    return np.arange(first, last + 1) * step + 0.0


class Axes:
    """The plane of a chart: where values lie, and the SVG of both axes."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_range, self.y_range = (widened(*limits) for limits in (x, y))

    def x(self, values: ArrayLike) -> np.ndarray:
        low, high = self.x_range
        return LEFT + (np.asarray(values) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, values: ArrayLike) -> np.ndarray:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (np.asarray(values) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def svg(self, x_name: str, y_name: str) -> str:
        parts, floor = [], HEIGHT - BOTTOM
        for value in nice_ticks(*self.y_range):
            at = f"{self.y(value):.1f}"
            parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".35em" class="end">{value:g}</text>')
        for value in nice_ticks(*self.x_range):
            at = f"{self.x(value):.1f}"
            parts.append(f'<text x="{at}" y="{floor + 16}" class="middle">{value:g}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
        centre = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{centre}" y="{HEIGHT - 8}" class="middle">{escape(x_name)}</text>')
        turned = f'transform="translate(12 {(TOP + floor) / 2}) rotate(-90)"'
        parts.append(f'<text {turned} class="middle">{escape(y_name)}</text>')
        return "".join(parts)


def widened(low: float, high: float) -> tuple[float, float]:
    """Limits with room between them, also where all values are the same."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def figure(name: str, title: str, description: str, content: str) -> str:
    """An SVG image; ``name`` makes the ids of its title and description unique in the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{name}-title" aria-describedby="{name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>{content}</svg>'
    )


def draw_lines(
    name: str,
    title: str,
    description: str,
    series: list[tuple[np.ndarray, np.ndarray]],
    names: tuple[str, str],
) -> str:
    """A line for each (x, y); a point where a line has one only. ``names`` are those of the axes"""
    x, y = (np.concatenate([line[axis] for line in series]) for axis in (0, 1))
    room = 0.05 * (y.max() - y.min())
    axes = Axes((x.min(), x.max()), (y.min() - room, y.max() + room))
    lines = []
    for i, (x, y) in enumerate(series):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(axes.x(x), axes.y(y), strict=True))
        if len(x) == 1:
            points = f"{points} {points}"  # with round caps, a line of no length is a dot
        lines.append(f'<polyline class="line line{i % LINE_STYLES}" points="{points}"/>')
    return figure(name, title, description, axes.svg(*names) + "".join(lines))


def draw_histogram(
    name: str, title: str, description: str, values: np.ndarray, step: float, names: tuple[str, str]
) -> tuple[str, Axes]:
    """Bars over bins of width ``step``; the axes tell where a value lies."""
    first, last = np.floor(values.min() / step), np.floor(values.max() / step) + 1
    edges = np.arange(first, last + 1) * step
    heights, _ = np.histogram(values, edges)
    axes = Axes((edges[0], edges[-1]), (0, heights.max()))
    bars = []
    for low, high, n in zip(axes.x(edges[:-1]), axes.x(edges[1:]), heights, strict=True):
        top = axes.y(n)
        bars.append(
            f'<rect class="bar" x="{low + 0.5:.1f}" width="{high - low - 1:.1f}" '
            f'y="{top:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
    return figure(name, title, description, axes.svg(*names) + "".join(bars)), axes
