"""python -m tests.soak: guests map files at random, and are killed."""

from __future__ import annotations

import argparse
import signal
import sys

from coherent_vfs.server.dax.view import View
from tests.soak.domain import Failed
from tests.soak.run import Settings, soak

EPILOG = """\
  python -m tests.soak                                  a minute
  python -m tests.soak --seconds 600 --seed 7
  python -m tests.soak --kill-every 0                   nobody is killed

Exit status: 0 all held and nothing was left, 1 something did not, or there is no DAX here, 2 wrong usage.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="User-space guests map, load, store, truncate and replace files through small DAX windows, "
        "while guests, backends and coherenced are killed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=Settings.seed, metavar="N", help="default: %(default)s")
    parser.add_argument("--guests", type=int, default=Settings.guests, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kill-every",
        type=float,
        default=Settings.kill_every,
        metavar="SECONDS",
        help="mean; 0: never (default: %(default)g)",
    )
    words = parser.parse_args()
    if not 1 <= words.guests <= 250 or words.seconds <= 0 or words.kill_every < 0:
        parser.error("--guests must be 1 to 250, --seconds more than 0, --kill-every not less")
    with View() as view:
        if not view.available:
            print(f"soak: no DAX here: {view.reason}", file=sys.stderr)
            return 1
    settings = Settings(guests=words.guests, seconds=words.seconds, seed=words.seed, kill_every=words.kill_every)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # it cleans up
    try:
        print(soak(settings, lambda text: print(text, file=sys.stderr, flush=True)))
    except Failed as failed:
        print(f"soak: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
