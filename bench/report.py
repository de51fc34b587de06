#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes one self-contained HTML page out of the JSON of the benches.

    python3 bench/report.py report.html attend_bench.json append_bench.json ...

With --strict it fails where a row failed, after writing the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reporting.page import page
from reporting.rows import load


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail where a row failed or none is there"
    )
    parser.add_argument("out", type=Path, help="the page to write")
    parser.add_argument("json", type=Path, nargs="+", help="files of --benchmark_out_format=json")
    args = parser.parse_args()
    try:
        rows = load(args.json)
        args.out.write_text(page(rows), encoding="utf-8")
    except (OSError, ValueError) as problem:
        print(f"report.py: {problem}", file=sys.stderr)
        return 1
    for row in rows.errors:
        print(f"report.py: {row.name}: {row.error}", file=sys.stderr)
    return 1 if args.strict and (rows.errors or not rows.good) else 0


if __name__ == "__main__":
    sys.exit(main())
