"""Play the litmus tests and say what was seen (python -m tests.lab.setup --all fetches the guests)."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab.paths import CHECKOUT, LabError
from tests.litmus.arena import stock_guests, user_space_guests
from tests.litmus.arrangement import LEASE_OPTIONS, Arrangement, Played, perform
from tests.litmus.catalogue import GROUPS
from tests.litmus.litmus import Litmus
from tests.litmus.mapped import MAPPED_GROUPS
from tests.litmus.report import Groups, account
from tests.litmus.side_channel import SideChannel

DOCUMENT = CHECKOUT / "docs/litmus.md"
KINDS = {
    "user-space": "User-space guests",
    "uml": "User-Mode Linux 6.12",
    "qemu": "Linux 6.12 in QEMU",
    "qemu-dax": "Linux 6.12 in QEMU 11.1, with DAX",
}


@dataclass(frozen=True)
class Chapter:
    """A generated part of the document, between markers with its title."""

    title: str
    kinds: frozenset[str]
    groups: Groups

    @property
    def tests(self) -> list[Litmus]:
        return list(itertools.chain.from_iterable(self.groups.values()))


CHAPTERS = (
    Chapter("Files and names", frozenset({"user-space", "uml", "qemu"}), GROUPS),
    Chapter("Mapped files", frozenset({"qemu-dax"}), MAPPED_GROUPS),
)


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
            for one in perform(arena, arrangement, rounds=count, seed=seed, only=only):
                say(f"{kind}, {arrangement.value}, {one.mode}: {time.monotonic() - start:.0f} s")
                for problem in one.problems():
                    say(f"  {problem}")
                played.append(one)
    return played


def write_document(chapter: Chapter, text: str) -> None:
    """Put an account between its markers in docs/litmus.md."""
    begin, end = f"<!-- {chapter.title}: begin -->", f"<!-- {chapter.title}: end -->"
    head, rest = DOCUMENT.read_text().split(begin, 1)
    DOCUMENT.write_text(f"{head}{begin}\n{text}{end}{rest.split(end, 1)[1]}")


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
    tests = [chapter.tests for chapter in CHAPTERS if not chapter.kinds.isdisjoint(kinds)]
    if missing := only - {test.name for test in itertools.chain.from_iterable(tests)}:
        parser.error(f"no test {', '.join(sorted(missing))} for these guests")
    most = SideChannel.rounds // max(map(len, tests))
    if not 0 < options.rounds <= most:
        parser.error(f"--rounds must be 1 to {most}")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    say(f"seed {seed}")
    try:
        results = {kind: play(kind, options.rounds, seed, only) for kind in kinds}
    except LabError as error:
        print(f"litmus: {error}", file=sys.stderr)
        return 1
    for chapter in CHAPTERS:
        if seen := {KINDS[kind]: played for kind, played in results.items() if kind in chapter.kinds}:
            text = account(chapter.title, seen, chapter.groups)
            if options.write_docs:
                write_document(chapter, text)
                say(f"wrote {DOCUMENT}")
            else:
                print(text, end="")
    return 1 if any(one.problems() for played in results.values() for one in played) else 0


if __name__ == "__main__":
    sys.exit(main())
