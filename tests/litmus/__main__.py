"""Play the litmus tests and say what was seen (python -m tests.lab.setup --all fetches the guests)."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence

from tests.lab.paths import CHECKOUT, LabError
from tests.litmus.arena import STOCK_MODES, USER_SPACE_MODES, stock_guests, user_space_guests
from tests.litmus.arrangement import LEASE_OPTIONS, Arrangement, Played, perform
from tests.litmus.catalogue import ALL
from tests.litmus.report import account
from tests.litmus.side_channel import SideChannel

DOCUMENT = CHECKOUT / "docs/litmus.md"
BEGIN, END = "<!-- seen: begin -->", "<!-- seen: end -->"
KINDS = {"user-space": "User-space guests", "uml": "User-Mode Linux 6.12", "qemu": "Linux 6.12 in QEMU"}


def say(line: str) -> None:
    print(f"litmus: {line}", file=sys.stderr, flush=True)


def play(kind: str, rounds: int, seed: int, only: frozenset[str]) -> list[Played]:
    """Play everything that a kind of guests can; with the host as a party a tenth of the rounds, as they wait."""
    stock = kind != "user-space"
    played = []
    with stock_guests(kind, LEASE_OPTIONS) if stock else user_space_guests(LEASE_OPTIONS) as arena:
        for arrangement in Arrangement:
            count = rounds if arrangement is Arrangement.GUESTS else max(rounds // 10, 10)
            start = time.monotonic()
            modes = STOCK_MODES if stock else USER_SPACE_MODES
            for one in perform(arena, modes, arrangement, rounds=count, seed=seed, only=only):
                say(f"{kind}, {arrangement.value}, {one.mode}: {time.monotonic() - start:.0f} s")
                for problem in one.problems():
                    say(f"  {problem}")
                played.append(one)
    return played


def write_document(text: str) -> None:
    """Put the account between its markers in docs/litmus.md."""
    head, rest = DOCUMENT.read_text().split(BEGIN, 1)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END, 1)[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.litmus", description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="guests, comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1000, help="of each test in each mode (default: %(default)s)")
    parser.add_argument("--tests", default="", help="only these, comma-separated names")
    parser.add_argument("--seed", type=int, help="of the random delays (default: another one each time)")
    parser.add_argument("--write-docs", action="store_true", help=f"also write {DOCUMENT.relative_to(CHECKOUT)}")
    options = parser.parse_args(arguments)
    kinds, only = options.kinds.split(","), frozenset(filter(None, options.tests.split(",")))
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no guests {', '.join(sorted(unknown))}: use {', '.join(KINDS)}")
    if missing := only - {test.name for test in ALL}:
        parser.error(f"no test {', '.join(sorted(missing))}")
    if not 0 < options.rounds <= SideChannel.rounds // len(ALL):
        parser.error(f"--rounds must be 1 to {SideChannel.rounds // len(ALL)}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    say(f"seed {seed}")
    try:
        results = {KINDS[kind]: play(kind, options.rounds, seed, only) for kind in kinds}
    except LabError as error:
        print(f"litmus: {error}", file=sys.stderr)
        return 1
    text = account(results)
    if options.write_docs:
        write_document(text)
        say(f"wrote {DOCUMENT}")
    else:
        print(text, end="")
    return 1 if any(one.problems() for played in results.values() for one in played) else 0


if __name__ == "__main__":
    sys.exit(main())
