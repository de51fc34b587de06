# SPDX-License-Identifier: MIT
"""Rows of the benches: names taken apart, repetitions folded into median, least and most."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

CONTAINERS = ["contiguous", "chunked", "paged", "plain"]
CODECS = ["f32", "f16", "bf16", "int8"]

# A row whose wall time exceeds its processor time by more than this shared the processor.
DISTURBED = 1.25

_NOT_MEASURED = {
    "name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions",
    "repetition_index", "threads", "iterations", "time_unit", "error_occurred", "error_message",
}  # fmt: skip
_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True)
class Value:
    """One figure of a row: over repetitions, or all three the same where there was one run."""

    median: float
    least: float
    most: float

    def over(self, scale: float) -> Value:
        return Value(self.median / scale, self.least / scale, self.most / scale)


@dataclass
class Row:
    """One benchmark, `what` and `keys` from its name "what/key:value/key:value"."""

    name: str
    what: str
    keys: dict[str, str]
    repetitions: int = 0
    error: str = ""
    values: dict[str, Value] = field(default_factory=dict)

    def get(self, counter: str) -> float | None:
        value = self.values.get(counter)
        return None if value is None else value.median

    @property
    def codec(self) -> str:
        return self.keys.get("codec", "")

    @property
    def cache(self) -> str:
        return self.keys.get("cache", "")

    @property
    def group_size(self) -> int:
        return int(self.keys.get("heads", 1)) // int(self.keys.get("kv_heads", 1))

    @property
    def disturbed(self) -> bool:
        """Whether the processor was taken away. Known for one thread only: of more, some wait."""
        real, cpu = self.get("real_time"), self.get("cpu_time")
        if self.keys.get("threads") != "1" or not real or not cpu:
            return False
        return real > DISTURBED * cpu


class Rows:
    """All rows of all files, and what they say about machine and build."""

    def __init__(self, rows: list[Row], contexts: list[dict]):
        self.all = rows
        self.contexts = contexts

    @property
    def good(self) -> list[Row]:
        return [row for row in self.all if not row.error]

    @property
    def errors(self) -> list[Row]:
        return [row for row in self.all if row.error]

    def context(self, key: str, default: str = "") -> str:
        """Of the first file that says it; "mixed" where files disagree."""
        values = [str(c[key]).strip() for c in self.contexts if str(c.get(key, "")).strip()]
        if not values:
            return default
        return values[0] if len(set(values)) == 1 else "mixed: " + ", ".join(sorted(set(values)))

    def find(self, what: str, **wanted: object) -> list[Row]:
        """Rows of that kind with these keys; a key that is None must be absent."""
        return [row for row in self.good if row.what == what and _matches(row, wanted)]

    def one(self, what: str, **wanted: object) -> Row | None:
        found = self.find(what, **wanted)
        return found[0] if found else None

    def key_values(self, what: str, key: str, **wanted: object) -> list[str]:
        """The different values of a key, numbers in order, words in order of appearance."""
        values = list(
            dict.fromkeys(r.keys[key] for r in self.find(what, **wanted) if key in r.keys)
        )
        return sorted(values, key=int) if all(v.isdigit() for v in values) else values

    @property
    def best_isa(self) -> str:
        """The instruction set that charts show: the one used by default, if it was measured."""
        measured = list(dict.fromkeys(r.keys["isa"] for r in self.good if "isa" in r.keys))
        best = self.context("isa_best")
        return best if best in measured or not measured else measured[-1]


def load(paths: list[Path]) -> Rows:
    """Reads files that Google Benchmark wrote. Raises ValueError naming a file that is not one."""
    rows: dict[str, Row] = {}
    contexts = []
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            contexts.append(data["context"])
            runs = data["benchmarks"]
        except (json.JSONDecodeError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}: not the JSON of a benchmark ({problem})") from problem
        samples: dict[str, dict[str, list[float]]] = {}
        for run in runs:
            if run.get("run_type", "iteration") == "iteration":
                _add_run(run, rows, samples)
        for name, counters in samples.items():
            rows[name].repetitions = max(len(numbers) for numbers in counters.values())
            for counter, numbers in counters.items():
                middle = statistics.median(numbers)
                rows[name].values[counter] = Value(middle, min(numbers), max(numbers))
    return Rows(list(rows.values()), contexts)


def _add_run(run: dict, rows: dict[str, Row], samples: dict[str, dict[str, list[float]]]) -> None:
    name = run.get("run_name", run["name"])
    row = rows.setdefault(name, _parse_name(name))
    if run.get("error_occurred"):
        row.error = run.get("error_message", "failed")
        return
    counters = samples.setdefault(name, {})
    for counter, number in run.items():
        if counter in _NOT_MEASURED or not isinstance(number, (int, float)):
            continue
        if counter in ("real_time", "cpu_time"):
            number *= _NS[run["time_unit"]]
        counters.setdefault(counter, []).append(float(number))


def _parse_name(name: str) -> Row:
    what, *parts = name.split("/")
    return Row(name, what, dict(part.split(":", 1) for part in parts if ":" in part))


def _matches(row: Row, wanted: dict[str, object]) -> bool:
    for key, value in wanted.items():
        if key == "group":
            if "heads" not in row.keys or row.group_size != value:
                return False
        elif (value is None) != (key not in row.keys) or (
            value is not None and row.keys[key] != str(value)
        ):
            return False
    return True
