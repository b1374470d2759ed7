"""Compare our backend with the Rust and the C virtiofsd, in real guests (python -m tests.lab.setup --all)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import document
from bench.compare.measure import OPERATIONS, PEERS, compare
from bench.compare.report import account, table
from tests.lab.paths import LabError


def say(line: str) -> None:
    print(f"compare: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--kind", choices=("uml", "qemu"), default="uml", help="guests to measure in (default: uml)")
    parser.add_argument("--boots", type=int, default=3, help="how often guests are booted anew (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after each boot (default: 5)")
    parser.add_argument("--backends", default=",".join(PEERS), help="which, comma-separated (default: %(default)s)")
    parser.add_argument("--operations", default="", help="only these, comma-separated names of latency.c")
    parser.add_argument(
        "--cpu", default=str((os.cpu_count() or 1) - 1), help="processor to run all on (default: the last)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write-docs", action="store_true", help="also write docs/development/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.boots < 1 or options.rounds < 1:
        parser.error("--boots and --rounds must be 1 or more")
    names = options.backends.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no backend {', '.join(sorted(unknown))}: use {', '.join(PEERS)}")
    wanted = options.operations.split(",") if options.operations else [operation.name for operation in OPERATIONS]
    if unknown := set(wanted) - {operation.name for operation in OPERATIONS}:
        parser.error(f"no operation {', '.join(sorted(unknown))}")
    try:
        results = compare(
            names,
            kind=options.kind,
            boots=options.boots,
            rounds=options.rounds,
            cpu=options.cpu,
            operations=[operation for operation in OPERATIONS if operation.name in wanted],
            say=say,
        )
    except LabError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(table(results), end="")
    if options.json:
        figures = {
            name: {title: dataclasses.asdict(cost) for title, cost in costs.items()} for name, costs in results.items()
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.write_docs:
        document.write("comparison", account(options.kind, options.boots, options.rounds, results))
        say(f"wrote {document.DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
