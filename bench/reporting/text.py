# SPDX-License-Identifier: MIT
"""Numbers as people read them, and the few pieces of HTML that everything uses."""

from __future__ import annotations

import html
import math


def escape(text: object) -> str:
    return html.escape(str(text))


def significant(x: float, digits: int = 3) -> str:
    """12345 -> "12 345", 12.345 -> "12.3", 0.0123 -> "0.0123"; never an exponent."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else str(x)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{min(decimals, 6)}f}".replace(",", "\u2009")


def duration(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{significant(ns / size)} {unit}"
    return f"{significant(ns)} ns"


def percent(x: float) -> str:
    return f"{x:.1f} %" if x < 9.95 else f"{x:.0f} %"


def gigabytes_per_second(x: float) -> str:
    return f"{significant(x / 1e9)} GB/s"


def error_size(x: float) -> str:
    """2.35e-03 -> "2.4e-3"."""
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def tokens(n: str | int) -> str:
    return f"{int(n):,}".replace(",", "\u2009")


def table(head: list[str], body: list[list[str]], css: str = "") -> str:
    """Cells are HTML already; a cell that starts with "<td" brings its own tag."""
    rows = []
    for cells in body:
        tags = (cell if cell.startswith("<t") else f"<td>{cell}</td>" for cell in cells)
        rows.append("<tr>" + "".join(tags) + "</tr>")
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
