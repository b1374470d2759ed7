"""python -m tests.torture: guests change files at random, others look."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from tests.coarse_file_system import MAKERS, CannotMount
from tests.torture.context import Odds
from tests.torture.domain import Plan
from tests.torture.run import Settings, torture

EPILOG = """\
  python -m tests.torture --kind uml --changes 10000
  python -m tests.torture --kind qemu --guests 3 --changes 100000 --kill-every 3
  python -m tests.torture --cache auto          does it find what auto is stale about?

SIGTERM ends a run early, with its report.
Exit status: 0 nothing was stale, 1 something was, or the run could not be made, 2 wrong usage.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Stock guests change files at random; others, which have just cached them, look at each change.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=["qemu", "uml"], default="uml", help="of guests (default uml)")
    parser.add_argument("--guests", type=int, default=2, metavar="N", help="default 2; with kills at least 3")
    parser.add_argument("--contexts", type=int, default=16, metavar="N", help="changes in flight (default 16)")
    parser.add_argument("--changes", type=int, default=10_000, metavar="N", help="default 10000")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--cache", default="shared", metavar="MODE", help="cache mode of the backends (default shared)")
    parser.add_argument("--warm", type=float, default=Odds.warm, metavar="P", help="how often witnesses look before")
    parser.add_argument("--looks", type=int, default=Odds.looks, metavar="N", help="most of one guest at one change")
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="SECONDS", help="default: no kills")
    parser.add_argument("--time-limit", type=float, default=1200.0, metavar="SECONDS", help="default 1200")
    parser.add_argument("--lease-max", type=float, default=Plan.lease_max, metavar="SECONDS", help="of the backends")
    parser.add_argument("--host-fs", choices=MAKERS, default="", help="what the share is on (default: what /tmp is on)")
    parser.add_argument("--lease-margin", type=float, default=Plan.lease_margin, metavar="SECONDS")
    return parser


def main() -> int:
    parser = _parser()
    words = parser.parse_args()
    if words.guests < (3 if words.kill_every else 2):
        parser.error("two guests are needed, with kills three")
    settings = Settings(
        plan=Plan(
            kind=words.kind,
            guests=words.guests,
            contexts=words.contexts,
            cache=words.cache,
            lease_max=words.lease_max,
            lease_margin=words.lease_margin,
            host_fs=words.host_fs,
        ),
        changes=words.changes,
        seed=words.seed,
        odds=Odds(warm=words.warm, looks=words.looks),
        kill_every=words.kill_every,
        seconds=words.time_limit,
    )
    enough = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: enough.set())
    try:
        report = torture(settings, lambda line: print(line, flush=True), enough)
    except CannotMount as error:
        print(f"torture: {error}", file=sys.stderr)
        return 1
    print(report)
    return 1 if report.stale else 0


if __name__ == "__main__":
    sys.exit(main())
