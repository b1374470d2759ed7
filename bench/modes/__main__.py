"""Measure what `cache=shared` gains and costs in real guests (python -m tests.lab.setup --all)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bench import document
from bench.modes import loops, trees
from bench.modes.report import account
from bench.modes.stage import age, open_stage
from tests.lab.paths import LabError

PARTS = ("loops", "trees")


def say(line: str) -> None:
    print(f"modes: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.modes", description=__doc__)
    parser.add_argument("--kind", choices=("qemu", "uml"), default="qemu", help="guests to measure in (default: qemu)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--seconds", type=float, default=2, help="length of a loop (default: 2, two leases)")
    parser.add_argument("--files", type=int, default=19_000, help="in the large tree (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--cpu", default=str((os.cpu_count() or 1) - 1), help="processor to run all on (default: the last)"
    )
    parser.add_argument("--write-docs", action="store_true", help="also write docs/development/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or options.files < 1:
        parser.error("--rounds and --files must be 1 or more, --seconds more than 0")
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    try:
        with open_stage(options.kind, options.cpu, say) as stage:
            if "loops" in parts:
                loops.prepare(stage)
            if "trees" in parts:
                trees.prepare(stage, options.files)
            age()
            looped = loops.measure(stage, options.rounds, options.seconds) if "loops" in parts else None
            walked = trees.measure(stage, options.rounds) if "trees" in parts else None
    except LabError as error:
        print(f"modes: {error}", file=sys.stderr)
        return 1
    text = account(options.kind, options.rounds, options.files, looped, walked)
    print(text, end="")
    if options.write_docs:
        summary = account(options.kind, options.rounds, options.files, looped, walked, summary=True)
        document.write(f"modes in {options.kind}", text, summary)
        say(f"wrote {document.DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
