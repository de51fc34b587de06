# SPDX-License-Identifier: MIT
"""Who won where: containers beside each other, and whether the difference is more than noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .rows import CONTAINERS, Row, Rows
from .text import duration, escape, percent, table, tokens

# Differences below this many percent are noise on any machine.
LEAST_DIFFERENCE = 3.0


@dataclass(frozen=True)
class Contest:
    """One line: a row per container, and the counter to compare (less is better)."""

    question: str
    rows: dict[str, Row]
    counter: str
    show: Callable[[float], str]

    def value(self, cache: str) -> float | None:
        return self.rows[cache].get(self.counter) if cache in self.rows else None

    @property
    def noise(self) -> float:
        """Percent: the median spread of the rows; quartiles in a run, extremes over repetitions."""
        if self.counter == "overhead_pct":
            return 0.0  # counted, not timed
        spreads = sorted(_spread(row, self.counter) for row in self.rows.values())
        return max(LEAST_DIFFERENCE, min(spreads[len(spreads) // 2], 30.0))

    @property
    def disturbed(self) -> bool:
        return self.noise > 0 and any(row.disturbed for row in self.rows.values())

    def within_noise(self, a: float, b: float) -> bool:
        return abs(a - b) <= self.noise / 100 * max(abs(a), abs(b)) + 1e-9


def _spread(row: Row, counter: str) -> float:
    value = row.values[counter]
    over_runs = 100 * (value.most - value.least) / value.median if value.median else 0.0
    return max(over_runs, (row.get("spread_pct") or 0.0) / 2)


def contests(rows: Rows) -> list[Contest]:
    """Every question that has answers for at least two containers."""
    isa = rows.best_isa
    lines = []

    def add(
        question: str, what: str, counter: str = "median_ns", show=duration, **wanted: object
    ) -> None:
        found = {r.cache: r for r in rows.find(what, **wanted) if counter in r.values}
        if len(found) > 1:
            lines.append(Contest(question, found, counter, show))

    for codec, note in (("f32", "f32, beside plain arrays"), ("bf16", "bf16")):
        for n in rows.key_values("layout_decode", "kv_len", codec=codec):
            add(
                f"Decode a layer of {tokens(n)} tokens, {note}",
                "layout_decode",
                codec=codec,
                kv_len=n,
            )
    longest = rows.key_values("decode", "kv_len", codec="bf16")[-1:]
    for n in longest:
        wanted = {
            "codec": "bf16",
            "kv_len": n,
            "isa": isa,
            "block": None,
            "memory": None,
            "group": 4,
        }
        for threads in rows.key_values("decode", "threads"):
            word = "thread" if threads == "1" else "threads"
            question = f"Decode a layer of {tokens(n)} tokens, bf16, {threads} {word}"
            add(question, "decode", threads=threads, **wanted)
    for codec in ("f32", "bf16"):
        add(f"Append one token to a layer, {codec}", "layout_append", codec=codec)
    add("Append 512 tokens to a layer, bf16", "append", codec="bf16", tokens=512, isa=isa)
    for n in rows.key_values("layout_growth", "kv_len"):
        add(
            f"Grow to {tokens(n)} tokens, per token, f32",
            "layout_growth",
            "ns_per_token",
            codec="f32",
            kv_len=n,
        )
        add(
            f"Memory beyond the tokens, at {tokens(n)}, f32",
            "layout_growth",
            "overhead_pct",
            percent,
            codec="f32",
            kv_len=n,
        )
    for n in rows.key_values("layout_fork", "kv_len")[-1:]:
        add(f"Fork {tokens(n)} tokens in 4 layers, f32", "layout_fork", codec="f32", kv_len=n)
        add("The same and append a token", "layout_fork_append", codec="f32", kv_len=n)
    add("Truncate to half, f32", "layout_truncate", codec="f32")
    return lines


def verdict_table(lines: list[Contest]) -> str:
    if not lines:
        return ""
    body = []
    for line in lines:
        values = {c: line.value(c) for c in CONTAINERS}
        best = min(v for v in values.values() if v is not None)
        mark = "<i class='mark'>\u25cf</i> " if line.disturbed else ""
        cells = [f"<td class='left'>{escape(line.question)}</td>"]
        for cache in CONTAINERS:
            value = values[cache]
            if value is None:
                cells.append("<td class='none'>\u2013</td>")
            else:
                css = "best" if value == best else "tie" if line.within_noise(value, best) else ""
                cells.append(f"<td class='{css}'>{escape(line.show(value))}</td>")
        cells.append(
            f"<td class='left verdict'>{mark + escape(_sentence(line, values, best))}</td>"
        )
        body.append(cells)
    return table(["less is better", *CONTAINERS, "so"], body, "verdicts")


def _sentence(line: Contest, values: dict[str, float | None], best: float) -> str:
    near = [c for c, v in values.items() if v is not None and line.within_noise(v, best)]
    far = [v for c, v in values.items() if v is not None and c not in near]
    noise = f" (noise {line.noise:.0f} %)" if line.noise > LEAST_DIFFERENCE else ""
    if not far:
        return "no difference beyond noise" + noise
    who = near[0] if len(near) == 1 else ", ".join(near[:-1]) + " and " + near[-1]
    if line.counter == "overhead_pct":
        return who
    ratio = min(far) / best if best else float("inf")
    ahead = (
        f"{100 * (ratio - 1):.0f} % ahead"
        if ratio < 2
        else f"{ratio:,.0f}\u00d7 ahead".replace(",", "\u2009")
    )
    return f"{who}, {ahead}{noise}"
