# SPDX-License-Identifier: MIT
"""Charts as inline SVG. Colours are CSS classes, so that one page serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .rows import Value
from .text import escape, significant

WIDTH = 560
HEIGHT = 256
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 26, 30


@dataclass(frozen=True)
class Bars:
    """A grouped bar chart. values[series][group] is None where nothing was measured."""

    title: str
    caption: str
    groups: list[str]
    series: list[str]
    values: list[list[Value | None]]
    axis: str
    top: float | None = None  # of the axis; from the values unless given
    line: float | None = None  # a line across, with its text
    line_text: str = ""
    label: Callable[[float], str] = significant

    @property
    def empty(self) -> bool:
        return all(value is None for row in self.values for value in row)


def color(series: str, index: int = 0) -> str:
    """A class for what has a colour of its own everywhere, else one by its place."""
    known = {"contiguous": 0, "chunked": 1, "paged": 2, "plain": 3}
    return f"c{known.get(series, (0, 1, 2, 4, 5, 3)[index % 6])}"


def nice_top(largest: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten, with room for a label."""
    wanted = largest * 1.12
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(
        step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= wanted
    )


def _tick(top: float) -> float:
    """A round distance that gives four to nine lines."""
    power = 10.0 ** math.floor(math.log10(top / 4))
    return max(step * power for step in (1, 2, 2.5, 5) if step * power <= top / 4)


def legend(names: list[str]) -> str:
    keys = (
        f'<span><i class="{color(name, i)}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def bars(chart: Bars) -> str:
    """The chart as a figure; empty text where there is nothing to show."""
    if chart.empty:
        return ""
    present = [v for row in chart.values for v in row if v is not None]
    # Whiskers fit in unless they are far beyond all bars.
    highest = max(v.median for v in present)
    reach = min(max(v.most for v in present), 2 * highest)
    top = chart.top or nice_top(max(reach, chart.line or 0))
    plot = _Plot(top)
    parts = [plot.grid(chart.axis)]
    if chart.line is not None:
        parts.append(plot.line(chart.line, chart.line_text))
    width = (WIDTH - LEFT - RIGHT) / len(chart.groups)
    bar = min(width * 0.82 / len(chart.series), 46)
    for g, group in enumerate(chart.groups):
        middle = LEFT + width * (g + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 18, group, "axis middle"))
        for s, name in enumerate(chart.series):
            value = chart.values[s][g]
            x = middle + (s - len(chart.series) / 2) * bar
            if value is not None:
                parts.append(plot.bar(x, bar, value, color(name, s), chart.label))
    return _figure(chart.title, chart.caption, legend(chart.series), HEIGHT, "".join(parts))


class _Plot:
    """The plane of a bar chart: from values to places."""

    def __init__(self, top: float):
        self.top = top

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value, 0), self.top) / self.top

    def grid(self, axis: str) -> str:
        parts = [_text(4, 12, axis, "axis")]
        step = _tick(self.top)
        for i in range(math.floor(self.top / step + 1e-9) + 1):
            value = step * i
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(_text(LEFT - 6, y + 4, f"{value:g}", "axis end"))
        return "".join(parts)

    def bar(
        self, x: float, width: float, value: Value, css: str, label: Callable[[float], str]
    ) -> str:
        y = self.y(value.median)
        height = max(HEIGHT - BOTTOM - y, 1)
        shown = label(value.median) + ("\u2191" if value.median > self.top else "")
        if width < 34:
            shown = shown.replace(" %", "")
        span = "" if value.least == value.most else f", {label(value.least)} to {label(value.most)}"
        parts = [
            f"<g><title>{escape(label(value.median) + span)}</title>",
            f'<rect class="{css}" x="{x + 1.5:.1f}" y="{y:.1f}" width="{width - 3:.1f}" '
            f'height="{height:.1f}" rx="2"/>',
        ]
        highest = y
        if value.least != value.most:
            middle = x + width / 2
            highest = self.y(value.most)
            parts.append(
                f'<path class="whisker" d="M{middle:.1f} {highest:.1f}V{self.y(value.least):.1f}'
                f'm-4 0h8M{middle - 4:.1f} {highest:.1f}h8"/>'
            )
        if width >= 20:
            parts.append(_text(x + width / 2, highest - 5, shown, "value middle"))
        return "".join(parts) + "</g>"

    def line(self, value: float, text: str) -> str:
        y = self.y(value)
        return (
            f'<line class="roof" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            + _text(WIDTH - RIGHT, y - 5, text, "roof end")
        )


def log_bars(
    title: str, caption: str, rows: list[tuple[str, str, Value]], label: Callable[[float], str]
) -> str:
    """Horizontal bars on a logarithmic axis, (name, series, value) each; for wide ranges."""
    if not rows:
        return ""
    low = math.floor(math.log10(min(v.median for _, _, v in rows)) - 0.3)
    high = math.ceil(math.log10(max(v.median for _, _, v in rows)))
    left, right, step = 210, 84, 24
    scale = (WIDTH - left - right) / max(high - low, 1)
    height = 30 + step * len(rows)
    parts = []
    every = 2 if high - low > 4 else 1
    for decade in range(low, high + 1):
        x = left + (decade - low) * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 20}"/>')
        if (decade - low) % every == 0:
            text = label(10.0**decade).replace(".00", "").replace(".0", "")
            parts.append(_text(x, height - 6, text, "axis middle small"))
    for i, (name, series, value) in enumerate(rows):
        y = 8 + step * i
        width = max((math.log10(value.median) - low) * scale, 2)
        parts.append(_text(left - 8, y + 14, name, "axis end"))
        parts.append(
            f'<rect class="{color(series)}" x="{left}" y="{y}" width="{width:.1f}" '
            f'height="{step - 6}" rx="2"/>'
        )
        parts.append(_text(left + width + 6, y + 14, label(value.median), "value"))
    return _figure(title, caption, "", height, "".join(parts))


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _figure(title: str, caption: str, keys: str, height: float, content: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(caption)}</span></figcaption>"
        f'{keys}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{content}</svg></figure>"
    )
