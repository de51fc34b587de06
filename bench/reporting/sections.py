# SPDX-License-Identifier: MIT
"""The parts of the page that are not charts: machine, warnings, a glance, slow rows, all rows."""

from __future__ import annotations

from .rows import Row, Rows
from .text import (
    count,
    duration,
    error_size,
    escape,
    gigabytes_per_second,
    percent,
    significant,
    table,
    tokens,
)
from .verdicts import contests, verdict_table

_UNUSUAL_LOAD = 0.5  # processes per processor, from others, before the run is called disturbed
_ABSENT = "\u00b7"  # shown for a key that a row does not have


def machine(rows: Rows) -> str:
    first = rows.contexts[0]
    caches = [c for c in first.get("caches", []) if c["type"] != "Instruction"]
    shown = ", ".join(f"L{c['level']} {_mebibytes(c['size'])}" for c in caches)
    virtual = " (virtual machine)" if rows.context("virtual_machine") == "yes" else ""
    gibibytes = float(rows.context("memory_mib", "0")) / 1024
    huge_pages = _chosen(rows.context("huge_pages", "unknown"))
    facts = [
        ("Processor", rows.context("cpu_model", "unknown") + virtual),
        ("Processors used", f"{rows.context('usable_cpus', '?')} of {first.get('num_cpus', '?')}"),
        ("Caches", shown or "unknown"),
        (
            "Memory",
            f"{gibibytes:.0f} GiB, huge pages: {huge_pages}",
        ),
        ("Compiler", rows.context("compiler", "unknown")),
        ("Flags", rows.context("flags", "none")),
        ("Kernels here", f"{rows.context('isa_available')}; charts show {rows.best_isa}"),
        (
            "Library",
            f"kvcache {rows.context('kvcache_version')}, "
            f"commit {rows.context('kvcache_commit') or 'unknown'}",
        ),
        ("Ring", f"{rows.context('ring_mib', '?')} MiB"),
        ("Date", first.get("date", "unknown").replace("T", " ")[:16]),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)


def _chosen(setting: str) -> str:
    """The word in brackets of "always [madvise] never"."""
    return setting.split("[")[1].split("]")[0] if "[" in setting else setting


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def warnings(rows: Rows) -> str:
    """What makes the figures below doubtful, said before them."""
    notes = []
    single = [r for r in rows.good if r.keys.get("threads") == "1"]
    disturbed = [r for r in single if r.disturbed]
    loads = [c["load_avg"][0] / c["num_cpus"] for c in rows.contexts if c.get("load_avg")]
    if disturbed and len(disturbed) >= 0.05 * len(single):
        notes.append(
            f"In {len(disturbed)} of {len(single)} rows of one thread the processor was taken away "
            "for more than a fifth of the time. They are marked \u25cf; their figures, and those "
            "of two threads, are not to be quoted."
        )
    if loads and max(loads) > _UNUSUAL_LOAD:
        notes.append(
            f"The machine was busy when a bench started: {max(loads):.1f} processes per processor. "
            "A bench leaves about that itself when another ran just before it."
        )
    if rows.context("assertions", "off") != "off":
        notes.append("Built with assertions on: the figures are not those of an optimised build.")
    if float(rows.context("ring_mib", "0")) < 2 * float(rows.context("last_level_cache_mib", "0")):
        notes.append(
            "The ring is smaller than twice the last-level cache: "
            "rows meant to be cold are partly hot."
        )
    for row in rows.errors:
        notes.append(f"{row.name}: {row.error}")
    return "".join(f'<p class="warning">{escape(note)}</p>' for note in notes)


def glance(rows: Rows) -> str:
    """A few figures, each with what it is of."""
    isa = rows.best_isa
    usual = {"isa": isa, "threads": 1, "block": None, "memory": None}
    tiles = []
    lengths = rows.key_values("decode", "kv_len", codec="bf16", group=4, **usual)
    if lengths:
        wanted = {"codec": "bf16", "kv_len": lengths[-1], "group": 4, **usual}
        rows_of = {c: rows.one("decode", cache=c, **wanted) for c in ("paged", "contiguous")}
        paged, contiguous = rows_of["paged"], rows_of["contiguous"]
        shown = paged or contiguous
        if shown is not None:
            note = (
                f"decode, bf16, {shown.cache}, {tokens(lengths[-1])} tokens, 4 heads a group, {isa}"
            )
            tiles.append((percent(shown.get("roof_pct") or 0), "of read bandwidth", note))
        if paged and contiguous:
            ratio = 100 * (contiguous.get("median_ns") or 0) / (paged.get("median_ns") or 1)
            tiles.append((percent(ratio), "paged against contiguous", "speed of the same decode"))
    calm = [r for r in rows.find("decode", isa=isa, threads=1) if not r.disturbed]
    best = max(calm, key=lambda r: r.get("roof_pct") or 0, default=None)
    if best is not None:
        tiles.append((percent(best.get("roof_pct") or 0), "best decode row", _short(best)))
    prefill = max(rows.find("prefill"), key=lambda r: r.get("flops_per_second") or 0, default=None)
    if prefill is not None:
        speed = significant((prefill.get("flops_per_second") or 0) / 1e9)
        part = percent(prefill.get("fma_peak_pct") or 0)
        tiles.append((speed, f"GFLOP/s in prefill, {part} of FMA peak", _short(prefill)))
    one = rows.one("append", codec="bf16", cache="paged", tokens=1, isa=isa)
    if one is not None:
        note = f"append one token, bf16, paged, {duration(one.get('ns_per_token') or 0)} a layer"
        tiles.append(
            (
                f"{significant(one.get('memcpy_ratio') or 0, 2)}\u00d7",
                "a memcpy of the float rows",
                note,
            )
        )
    errors = [r for r in rows.find("decode", codec="bf16") if r.get("rel_err") is not None]
    if errors:
        worst = max(errors, key=lambda r: r.get("rel_err") or 0)
        tiles.append(
            (error_size(worst.get("rel_err") or 0), "largest relative error, bf16", _short(worst))
        )
    return "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(what)}</span>'
        f"<small>{escape(note)}</small></div>"
        for big, what, note in tiles
    )


def _short(row: Row) -> str:
    keys = row.keys
    parts = [
        keys.get("codec"),
        keys.get("cache"),
        f"{tokens(keys['kv_len'])} tokens" if "kv_len" in keys else None,
    ]
    if "heads" in keys and "kv_heads" in keys:
        parts.append(f"group {row.group_size}")
    parts += [keys.get("isa"), count(int(keys.get("threads", 1)), "thread")]
    parts += [f"{key} {keys[key]}" for key in ("q_len", "batch", "block", "memory") if key in keys]
    return ", ".join(part for part in parts if part)


def verdicts(rows: Rows) -> str:
    return verdict_table(contests(rows))


def slow(rows: Rows) -> str:
    """The rows furthest from their roofs, and what costs more than it should."""
    isa = rows.best_isa
    items = []
    calm = [r for r in rows.find("decode", isa=isa, threads=1, memory=None) if not r.disturbed]
    for row in sorted(calm, key=lambda r: r.get("roof_pct") or 0)[:3]:
        part = percent(row.get("roof_pct") or 0)
        items.append(f"Decode at {part} of read bandwidth: {_short(row)}.")
    prefill = min(
        rows.find("prefill", isa=isa), key=lambda r: r.get("fma_peak_pct") or 0, default=None
    )
    if prefill is not None:
        took = duration(prefill.get("median_ns") or 0)
        part = percent(prefill.get("fma_peak_pct") or 0)
        items.append(f"Prefill at {part} of the FMA peak, {took} for one layer: {_short(prefill)}.")
    dear = max(rows.find("append", isa=isa), key=lambda r: r.get("memcpy_ratio") or 0, default=None)
    if dear is not None:
        ratio = significant(dear.get("memcpy_ratio") or 0, 2)
        what = count(int(dear.keys["tokens"]), "token")
        items.append(f"Append of {what} at {ratio} times a memcpy: {_short(dear)}.")
    for line in contests(rows):
        plain, ours = line.value("plain"), [
            v for c in line.rows if c != "plain" and (v := line.value(c))
        ]
        if plain and ours and min(ours) > plain and not line.within_noise(min(ours), plain):
            items.append(
                f"Plain arrays win at \u201c{line.question}\u201d: "
                f"{line.show(plain)} against {line.show(min(ours))}."
            )
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


_COLUMNS = [
    ("time", "median_ns", duration),
    ("rate", "bytes_per_second", gigabytes_per_second),
    ("of roof", "roof_pct", percent),
    ("error", "rel_err", error_size),
    ("GFLOP/s", "flops_per_second", lambda x: significant(x / 1e9)),
    ("of FMA peak", "fma_peak_pct", percent),
    ("\u00d7 memcpy", "memcpy_ratio", lambda x: significant(x, 2)),
    ("per token", "ns_per_token", duration),
    ("slack", "overhead_pct", percent),
    ("spread", "spread_pct", percent),
    ("samples", "samples", lambda x: f"{x:.0f}"),
]


def all_rows(rows: Rows) -> str:
    """Every row with every figure, a folded table for each kind."""
    parts = []
    for what in dict.fromkeys(row.what for row in rows.good):
        found = rows.find(what)
        keys = [
            k
            for k in dict.fromkeys(k for r in found for k in r.keys)
            if len({r.keys.get(k) for r in found}) > 1
        ]
        fixed = {k: v for k, v in found[0].keys.items() if k not in keys}
        columns = [c for c in _COLUMNS if any(c[1] in r.values for r in found)]
        body = []
        for row in found:
            mark = '<i class="mark" title="disturbed">\u25cf</i>' if row.disturbed else ""
            cells = [f"<td class='left'>{escape(row.keys.get(k, _ABSENT))}</td>" for k in keys]
            body.append(
                cells + [_cell(row, counter, show) for _, counter, show in columns] + [mark]
            )
        same = ", ".join(f"{k} {v}" for k, v in fixed.items())
        parts.append(
            f"<details><summary><b>{escape(what)}</b> {count(len(found), 'row')} "
            f"<small>{escape(same)}</small></summary>"
            + table([*keys, *(name for name, _, _ in columns), ""], body, "rows")
            + "</details>"
        )
    return "".join(parts)


def _cell(row: Row, counter: str, show) -> str:
    value = row.values.get(counter)
    if value is None:
        return ""
    span = ""
    if (
        row.repetitions > 1
        and value.least != value.most
        and counter not in ("samples", "spread_pct")
    ):
        span = f"<small>{escape(show(value.least))} \u2013 {escape(show(value.most))}</small>"
    return escape(show(value.median)) + span
