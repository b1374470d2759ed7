"""Measure what DAX gains and costs in real guests (python -m tests.lab.setup --all)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bench import document
from bench.dax import memory, report, speed
from bench.dax.stage import DAX, SHARED, WAYS, open_stage
from coherent_vfs.server.dax.view import View
from tests.lab.paths import LabError

PARTS = ("speed", "memory")
GUESTS = 4
"""That read the same file."""


def say(line: str) -> None:
    print(f"dax: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dax", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often speed is measured (default: 3)")
    parser.add_argument("--seconds", type=float, default=1, help="length of a loop (default: 1)")
    parser.add_argument(
        "--size",
        type=int,
        default=1024,
        help="of the file whose memory is measured, MiB, a power of two (default: 1024)",
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--cpu", default=str((os.cpu_count() or 1) - 1), help="processor to run all on (default: the last)"
    )
    parser.add_argument("--write-docs", action="store_true", help="also write docs/development/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or options.size < 2 or options.size & (options.size - 1):
        parser.error("--rounds must be 1 or more, --seconds more than 0, --size a power of two")
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    with View() as view:
        if not view.available:
            print(f"dax: no DAX here: {view.reason}", file=sys.stderr)
            return 1
    try:
        if "speed" in parts:
            with open_stage(WAYS, 1, 512, "128M", options.cpu, say) as stage:
                results = speed.measure(stage, options.rounds, options.seconds)
            _show(report.speeds(results, options.rounds), "speed", options.write_docs)
        if "memory" in parts:
            taken = {way: memory.measure(way, options.size, GUESTS, options.cpu, say) for way in (DAX, SHARED)}
            _show(report.memory(taken, options.size, GUESTS), "memory", options.write_docs)
    except LabError as error:
        print(f"dax: {error}", file=sys.stderr)
        return 1
    return 0


def _show(text: str, part: str, write: bool) -> None:
    print(text, flush=True)
    if write:
        document.write(f"dax {part}", text)
        say(f"wrote {document.DOCUMENT}")


if __name__ == "__main__":
    sys.exit(main())
