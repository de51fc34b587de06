# SPDX-License-Identifier: MIT
"""The page itself: one HTML file with everything inside."""

from __future__ import annotations

from pathlib import Path

from . import chart_set, sections
from .rows import Rows
from .text import count, escape

_HOW_TO_READ = """
<div>
<p><b>The roof.</b> Decode has to read every stored key and value once, so it cannot be faster than
reading those bytes and doing nothing with them. Each row measures both in turn: the operation, then
a pure read of the same bytes by the same threads. <b>100 % is that read</b>; what is missing is
arithmetic that did not hide behind it.</p>
<p><b>Cold.</b> Rows walk a ring of layers larger than the last-level cache, as a model does that
streams through its other layers between two visits. Rows marked <code>memory:hot</code> read one
layer over and over, and so does their roof.</p>
</div>
<div>
<p><b>Error.</b> |out &minus; reference| / |reference| against double-precision attention on the
floats that were appended: what the codec rounds away is part of it. A row whose error is beyond its
codec's bound fails.</p>
<p><b>Noise.</b> Figures are medians over the samples of a run; <i>spread</i> is the distance
between the quartiles, in percent of the median. __REPETITIONS__ Two values count as different only
if they differ by more than 3 % and more than the spread of their rows.</p>
</div>
"""

_METHOD = """
<ul>
<li>Operation and roof alternate in one process over the same ring; the roof reads the half of the
ring that is farthest away. The percentage is a ratio of two medians of one run, so a slow phase of
the machine hits both.</li>
<li>The roof is the fastest of three readers (one stream per thread, four, four with software
prefetch), with the widest loads of the processor whatever the compiler flags. It reads stretches in
order of address, wherever they lie.</li>
<li>Threads are pinned, one per core first. The calling thread is one of them.</li>
<li>Prefill counts two multiply-adds per visible pair of query and key, per dimension; hidden pairs
are not work. The peak beside it is ten independent chains of fused multiply-adds, the widest the
processor has.</li>
<li>Errors are checked on the query heads of the first and the last KV head and up to four query
tokens, over the full length.</li>
<li>Append works on warm memory: the sequence grows, is cut back and grows again. What fresh memory
costs is in &ldquo;Growing from nothing&rdquo;.</li>
<li>The plain twin is float arrays <code>[head][token][dim]</code> that double when full, and an
attention of two passes per query head: what one writes without a library. It has no huge pages,
because a <code>std::vector</code> has none.</li>
</ul>
"""


def _chart_section(title: str, text: str, charts: list[str]) -> str:
    shown = "".join(charts)
    if not shown:
        return ""
    return f'<h2>{title}</h2><p>{text}</p><div class="charts">{shown}</div>'


def _section(title: str, text: str, content: str) -> str:
    return f"<h2>{title}</h2><p>{text}</p>{content}" if content else ""


def page(rows: Rows) -> str:
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    repetitions = max((row.repetitions for row in rows.all), default=0)
    repeated = (
        f"This run repeated rows up to {count(repetitions, 'time')}: figures are medians over "
        "repetitions, whiskers and small print their least and most."
        if repetitions > 1
        else "This run did not repeat its rows; <code>--benchmark_repetitions=5</code> adds least "
        "and most."
    )
    content = [
        "<header><h1>kvcache benchmarks</h1>",
        '<p class="lead">Keys and values of a transformer in three containers, and attention over '
        "them, beside what this machine can do at most.</p></header>",
        f"<dl>{sections.machine(rows)}</dl>",
        sections.warnings(rows),
        f'<div class="tiles">{sections.glance(rows)}</div>',
        '<h2>How to read this</h2><div class="card columns">'
        + _HOW_TO_READ.replace("__REPETITIONS__", repeated)
        + "</div>",
        _section(
            "Which layout won where",
            "Medians; the darker cell is the best, the lighter ones are as good within noise. "
            "\u25cf: a row of the line shared its processor, so nothing is decided.",
            _card(sections.verdicts(rows)),
        ),
        _chart_section(
            "Decode",
            "One new token attends to everything stored; groups are query heads per KV head. "
            "Bars are percent of the read bandwidth measured beside them.",
            [
                *chart_set.decode(rows),
                *chart_set.lengths_and_groups(rows),
                *chart_set.instruction_sets(rows),
                *chart_set.batches_and_blocks(rows),
            ],
        ),
        _chart_section(
            "Prefill",
            "Many new tokens at once: bound by arithmetic, not by memory.",
            chart_set.prefill(rows),
        ),
        _chart_section(
            "Append", "Conversion and transposition into block order.", chart_set.append(rows)
        ),
        _chart_section("Containers", "What the layouts differ in.", chart_set.containers(rows)),
        _section(
            "What is slow",
            "The rows furthest from where they could be.",
            _card(sections.slow(rows)),
        ),
        _section(
            "All rows",
            f"{count(len(rows.good), 'row')}; error beside speed. "
            "\u25cf marks rows that shared their processor.",
            sections.all_rows(rows),
        ),
        _section("Method", "The long version is in bench/README.md.", _card(_METHOD)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvcache benchmarks, {escape(rows.context('cpu_model'))}</title>"
        f"<style>{style}</style></head>"
        f"<body><main>{''.join(content)}</main></body></html>\n"
    )


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>' if content else ""
