# SPDX-License-Identifier: MIT
"""Which charts the report shows: each is left out where its rows are missing."""

from __future__ import annotations

from .charts import Bars, bars, log_bars
from .rows import CODECS, CONTAINERS, Row, Rows, Value
from .text import count, duration, percent, significant, tokens

ROOF = {
    "axis": "% of read bandwidth",
    "top": 110.0,
    "line": 100.0,
    "line_text": "only reading the bytes",
}


def _values(rows: list[Row | None], counter: str) -> list[Value | None]:
    return [row.values.get(counter) if row is not None else None for row in rows]


def _without_empty(
    names: list[str], values: list[list[Value | None]]
) -> tuple[list[str], list[list[Value | None]]]:
    kept = [i for i, row in enumerate(values) if any(v is not None for v in row)]
    return [names[i] for i in kept], [values[i] for i in kept]


def _chart(series: list[str], values: list[list[Value | None]], **rest) -> str:
    series, values = _without_empty(series, values)
    return bars(Bars(series=series, values=values, **rest)) if values else ""


def _threads(n: str) -> str:
    return count(int(n), "thread")


def decode(rows: Rows) -> list[str]:
    """Codecs x containers, for each number of threads, at the greatest length."""
    isa = rows.best_isa
    base = {"isa": isa, "group": 4, "block": None, "memory": None}
    charts = []
    lengths = rows.key_values("decode", "kv_len", **base)
    for threads in rows.key_values("decode", "threads", **base):
        longest = lengths[-1]
        values = [
            _values(
                [
                    rows.one("decode", codec=q, cache=c, kv_len=longest, threads=threads, **base)
                    for q in CODECS
                ],
                "roof_pct",
            )
            for c in CONTAINERS
        ]
        charts.append(
            _chart(
                CONTAINERS,
                values,
                title=f"Decode by codec and container, {_threads(threads)}",
                caption=f"one token over {tokens(longest)} tokens, groups of 4, {isa}",
                groups=CODECS,
                label=percent,
                **ROOF,
            )
        )
    return charts


def lengths_and_groups(rows: Rows) -> list[str]:
    isa = rows.best_isa
    codec = "bf16" if rows.find("decode", codec="bf16") else "f32"
    base = {"isa": isa, "threads": 1, "codec": codec, "block": None, "memory": None}
    lengths = rows.key_values("decode", "kv_len", group=4, **base)
    groups = sorted({r.group_size for r in rows.find("decode", **base)})
    longest = lengths[-1] if lengths else ""
    by_length = [
        _values(
            [rows.one("decode", cache=c, kv_len=n, group=4, **base) for n in lengths], "roof_pct"
        )
        for c in CONTAINERS
    ]
    by_group = [
        _values(
            [rows.one("decode", cache=c, kv_len=longest, group=n, **base) for n in groups],
            "roof_pct",
        )
        for c in CONTAINERS
    ]
    return [
        _chart(
            CONTAINERS,
            by_length,
            title="Decode by length",
            caption=f"{codec}, groups of 4, 1 thread, {isa}; the ring keeps short ones cold too",
            groups=[f"{tokens(n)} tokens" for n in lengths],
            label=percent,
            **ROOF,
        ),
        _chart(
            CONTAINERS,
            by_group,
            title="Decode by group size",
            caption=f"{codec}, {tokens(longest or 0)} tokens, 1 thread, {isa}; "
            "larger groups do more arithmetic per byte",
            groups=[f"group of {n}" for n in groups],
            label=percent,
            **ROOF,
        ),
    ]


def instruction_sets(rows: Rows) -> list[str]:
    """Only where there is something to choose from."""
    base = {"cache": "paged", "group": 4, "threads": 1, "block": None, "memory": None}
    levels = rows.key_values("decode", "isa", **base)
    lengths = rows.key_values("decode", "kv_len", **base)
    if len(levels) < 2:
        return []
    values = [
        _values(
            [rows.one("decode", codec=q, isa=level, kv_len=lengths[-1], **base) for q in CODECS],
            "roof_pct",
        )
        for level in levels
    ]
    caption = f"paged, {tokens(lengths[-1])} tokens, 4 query heads per KV head, 1 thread"
    return [
        _chart(
            levels,
            values,
            title="Decode by instruction set",
            caption=caption,
            groups=CODECS,
            label=percent,
            **ROOF,
        )
    ]


def batches_and_blocks(rows: Rows) -> list[str]:
    isa = rows.best_isa
    base = {"isa": isa, "threads": 1, "cache": "paged", "group": 4}
    one = {"block": None, "memory": None}
    batch = rows.find("batch", **base)
    length = batch[0].keys["kv_len"] if batch else ""
    size = batch[0].keys["batch"] if batch else ""
    single = [rows.one("decode", codec=q, kv_len=length, **base, **one) for q in CODECS]
    many = [rows.one("batch", codec=q, **base) for q in CODECS]
    blocks = [
        rows.one("decode", codec="bf16", kv_len=16384, block=b, memory=None, **base)
        for b in (16, None, 256)
    ]
    warm = rows.one("decode", codec="bf16", memory="hot", **base)
    cold = rows.one("decode", codec="bf16", kv_len=512, **base, **one)
    charts = [
        (
            _chart(
                ["1 sequence", f"{size} sequences"],
                [_values(single, "roof_pct"), _values(many, "roof_pct")],
                title="Batches",
                caption=f"{size} sequences in one call beside one alone, {tokens(length)} tokens, "
                f"paged, 1 thread, {isa}",
                groups=CODECS,
                label=percent,
                **ROOF,
            )
            if batch
            else ""
        )
    ]
    if blocks[0] is not None:
        charts.append(
            _chart(
                ["paged"],
                [_values([*blocks, cold, warm], "roof_pct")],
                title="Block size, and memory against cache",
                caption=f"bf16, paged, 1 thread, {isa}; cold and hot: 512 tokens out of the ring, "
                "or one layer over and over beside the roof of that",
                groups=["block 16", "block 64", "block 256", "cold", "hot"],
                label=percent,
                **ROOF,
            )
        )
    return charts


def prefill(rows: Rows) -> list[str]:
    isa = rows.best_isa
    base = {"isa": isa, "cache": "paged"}
    threads = rows.key_values("prefill", "threads", **base)
    found = rows.find("prefill", **base)
    if not found:
        return []
    keys = found[0].keys
    where = f"{keys['q_len']} new tokens on {tokens(keys['kv_len'])} in all, paged, {isa}"
    names = [_threads(n) for n in threads]
    beyond = any(r.values["fma_peak_pct"].most > 105 for r in found)  # matrix units

    def by_codec(counter: str, scale: float) -> list[list[Value | None]]:
        table = []
        for n in threads:
            values = _values(
                [rows.one("prefill", codec=q, threads=n, **base) for q in CODECS], counter
            )
            table.append([v and v.over(scale) for v in values])
        return table

    return [
        _chart(
            names,
            by_codec("flops_per_second", 1e9),
            title="Prefill: speed",
            caption=where,
            groups=CODECS,
            axis="GFLOP/s, visible pairs only",
        ),
        _chart(
            names,
            by_codec("fma_peak_pct", 1),
            title="Prefill: part of the fp32 FMA peak",
            caption=where + "; the peak is measured beside it, on as many threads",
            groups=CODECS,
            axis="% of FMA peak",
            top=None if beyond else 110.0,
            line=100.0,
            line_text="nothing but fused multiply-adds in registers",
            label=percent,
        ),
    ]


def append(rows: Rows) -> list[str]:
    isa = rows.best_isa
    charts = []
    for n in rows.key_values("append", "tokens", isa=isa):
        values = [
            _values(
                [rows.one("append", codec=q, cache=c, tokens=n, isa=isa) for q in CODECS],
                "memcpy_ratio",
            )
            for c in CONTAINERS
        ]
        charts.append(
            _chart(
                CONTAINERS,
                values,
                title=f"Append, {count(int(n), 'token')} at a time",
                caption="time over that of a memcpy of the same floats (dashed); less is better; "
                f"8 KV heads x 128, {isa}",
                groups=CODECS,
                axis="times a memcpy",
                line=1.0,
                line_text="",
                label=lambda x: f"{significant(x, 2)}\u00d7",
            )
        )
    return charts


def containers(rows: Rows) -> list[str]:
    """What the layouts differ in, f32, because the plain twin has no other codec."""
    return [_beside_plain(rows), _fork_and_truncate(rows), *_growth(rows)]


def _beside_plain(rows: Rows) -> str:
    base = {"codec": "f32"}
    groups = [
        (what, n)
        for what in ("layout_walk", "layout_decode")
        for n in rows.key_values(what, "kv_len", **base)
    ]
    values = [
        _values([rows.one(what, cache=c, kv_len=n, **base) for what, n in groups], "roof_pct")
        for c in CONTAINERS
    ]
    return _chart(
        CONTAINERS,
        values,
        title="Beside plain arrays",
        caption="f32, 1 thread; walk: every block visited and read; decode: groups of 4",
        groups=[f"{what.removeprefix('layout_')} {tokens(n)}" for what, n in groups],
        label=percent,
        **ROOF,
    )


def _fork_and_truncate(rows: Rows) -> str:
    costs = []
    for what, name in (
        ("layout_fork", "fork"),
        ("layout_fork_append", "fork + append"),
        ("layout_truncate", "truncate by half"),
    ):
        for cache in CONTAINERS:
            found = rows.find(what, cache=cache, codec="f32")
            if found:
                longest = max(found, key=lambda r: int(r.keys["kv_len"]))
                costs.append((f"{name}, {cache}", cache, longest.values["median_ns"]))
    return log_bars(
        "Fork and truncate",
        "f32, 4 layers of about 4 096 tokens (134 MB), logarithmic; paged shares, the others copy",
        costs,
        duration,
    )


def _growth(rows: Rows) -> list[str]:
    lengths = rows.key_values("layout_growth", "kv_len", codec="f32")
    groups = [f"{tokens(n)} tokens" for n in lengths]

    def by_length(counter: str, scale: float = 1.0) -> list[list[Value | None]]:
        found = []
        for c in CONTAINERS:
            row = [rows.one("layout_growth", codec="f32", cache=c, kv_len=n) for n in lengths]
            found.append([v and v.over(scale) for v in _values(row, counter)])
        return found

    return [
        _chart(
            CONTAINERS,
            by_length("ns_per_token", 1e3),
            title="Growing from nothing",
            caption="f32, one token at a time, memory fresh from the system; per token and layer",
            groups=groups,
            axis="microseconds",
        ),
        _chart(
            CONTAINERS,
            by_length("overhead_pct"),
            title="Memory that holds no tokens",
            caption="granted bytes beyond what the tokens take, after growing to that length, f32",
            groups=groups,
            axis="% of payload",
            label=percent,
        ),
    ]
