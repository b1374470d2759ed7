"""Play the litmus tests and say what was seen (python -m tests.lab.setup --all fetches the guests)."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.coarse_file_system import MAKERS
from tests.lab.paths import CHECKOUT, LabError
from tests.litmus.arena import stock_guests, user_space_guests
from tests.litmus.arrangement import LEASE_OPTIONS, Arrangement, perform
from tests.litmus.catalogue import GROUPS
from tests.litmus.litmus import Litmus, Mode
from tests.litmus.mapped import MAPPED_GROUPS
from tests.litmus.records import Record, added_up, keep, load, record, told
from tests.litmus.report import Groups, account, data, summary
from tests.litmus.side_channel import LANES, SideChannel

DOCUMENT = CHECKOUT / "docs/development/litmus.md"
DATA = CHECKOUT / "docs/data"
PARTIES = ("guests", "host")
KINDS = {
    "user-space": "User-space guests",
    "uml": "User-Mode Linux 6.12",
    "qemu": "Linux 6.12 in QEMU",
    "qemu-dax": "Linux 6.12 in QEMU 11.1, with DAX",
}


@dataclass(frozen=True)
class Chapter:
    """A generated part of the document, between markers with its title, and the file that has all of its results."""

    title: str
    file: str
    kinds: frozenset[str]
    groups: Groups

    @property
    def tests(self) -> list[Litmus]:
        return list(itertools.chain.from_iterable(self.groups.values()))


CHAPTERS = (
    Chapter("Files and names", "litmus-files.json", frozenset({"user-space", "uml", "qemu"}), GROUPS),
    Chapter("Mapped files", "litmus-mapped.json", frozenset({"qemu-dax"}), MAPPED_GROUPS),
)
TESTS = {test.name: test for chapter in CHAPTERS for test in chapter.tests}


def say(line: str) -> None:
    print(f"litmus: {line}", file=sys.stderr, flush=True)


def play(
    kind: str,
    rounds: Mapping[Arrangement, int],
    seed: int,
    only: frozenset[str],
    modes: Collection[Mode],
    lanes: int,
    host_fs: str,
) -> Iterator[Record]:
    """Play what a kind of guests can, so many rounds of each arrangement."""
    with (
        user_space_guests(LEASE_OPTIONS, modes, host_fs)
        if kind == "user-space"
        else stock_guests(kind, LEASE_OPTIONS, modes, host_fs)
    ) as arena:
        for arrangement, count in rounds.items():
            start = time.monotonic()
            for one in perform(arena, arrangement, rounds=count, seed=seed, only=only, lanes=lanes):
                say(f"{kind}, {arrangement.value}, {one.mode}: {time.monotonic() - start:.0f} s")
                yield record(kind, seed, one)


def rounds_of(parties: Collection[str], rounds: int) -> dict[Arrangement, int]:
    """How often each arrangement is played: with the host they wait long, so beside others a tenth is enough."""
    with_host = rounds if "guests" not in parties else max(rounds // 10, 3)
    return {
        one: rounds if one is Arrangement.GUESTS else with_host
        for one in Arrangement
        if ("guests" if one is Arrangement.GUESTS else "host") in parties
    }


def write_document(chapter: Chapter, text: str) -> None:
    """Put a summary between its markers in the document."""
    begin, end = f"<!-- {chapter.title}: begin -->", f"<!-- {chapter.title}: end -->"
    head, rest = DOCUMENT.read_text().split(begin, 1)
    DOCUMENT.write_text(f"{head}{begin}\n{text}{end}{rest.split(end, 1)[1]}")


def publish(records: Sequence[Record], write_docs: bool) -> bool:
    """Print or write the account of all that was played; whether it was as expected."""
    results = {
        kind: added_up(found, TESTS) for kind in KINDS if (found := [one for one in records if one.kind == kind])
    }
    for chapter in CHAPTERS:
        if kinds := [kind for kind in results if kind in chapter.kinds]:
            runs = {KINDS[kind]: told([one for one in records if one.kind == kind]) for kind in kinds}
            seen = {KINDS[kind]: results[kind] for kind in kinds}
            if write_docs:
                write_document(chapter, summary(runs, seen))
                (DATA / chapter.file).write_bytes(msgspec.json.encode(data(chapter.title, runs, seen)) + b"\n")
                say(f"wrote {DOCUMENT} and {DATA / chapter.file}")
            else:
                print(account(chapter.title, runs, seen, chapter.groups), end="")
    problems = [problem for played in results.values() for one in played for problem in one.problems()]
    for problem in problems:
        say(problem)
    return not problems


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.litmus",
        description=__doc__,
        epilog="Exit status: 0 all was as expected, 1 something was not, or could not be played, 2 wrong usage.",
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="guests, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=1000, help="of each test in each mode; 0: only tell what was kept (default 1000)"
    )
    parser.add_argument("--tests", default="", help="only these, comma-separated names")
    parser.add_argument("--modes", default="", help="only these, comma-separated (default: all that the guests have)")
    parser.add_argument(
        "--parties",
        default=",".join(PARTIES),
        help="guests: among themselves; host: it takes part, a tenth of the rounds if both are played "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--lanes",
        type=int,
        default=0,
        help="rounds at once where changes wait for leases: fewer, where many are disturbed (default: by the guests)",
    )
    parser.add_argument(
        "--host-fs",
        choices=MAKERS,
        default="",
        help="what the shares are on: with timestamps of one second, or of two and without the tests of links and "
        "modes; not for the document (default: what /var/tmp is on)",
    )
    parser.add_argument("--seed", type=int, help="of the random delays (default: another one each time)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add to what earlier runs kept in this file")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help=f"also write {DOCUMENT.relative_to(CHECKOUT)} and {DATA.relative_to(CHECKOUT)}/litmus-*.json",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    kinds, only, modes = _words(options.kinds), frozenset(_words(options.tests)), _words(options.modes)
    parties = _words(options.parties)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no guests {', '.join(sorted(unknown))}: use {', '.join(KINDS)}")
    if unknown := set(modes) - set(Mode):
        parser.error(f"no mode {', '.join(sorted(unknown))}: use {', '.join(Mode)}")
    if unknown := set(parties) - set(PARTIES):
        parser.error(f"no parties {', '.join(sorted(unknown))}: use {', '.join(PARTIES)}")
    tests = [chapter.tests for chapter in CHAPTERS if not chapter.kinds.isdisjoint(kinds)]
    if missing := only - {test.name for test in itertools.chain.from_iterable(tests)}:
        parser.error(f"no test {', '.join(sorted(missing))} for these guests")
    most = SideChannel.rounds // max(map(len, tests))
    if not 0 <= options.rounds <= most:
        parser.error(f"--rounds must be 0 to {most}")
    if not 0 <= options.lanes <= LANES:
        parser.error(f"--lanes must be 0 to {LANES}")
    if options.host_fs and (options.keep or options.write_docs):
        parser.error("--host-fs is not for the document: leave out --keep and --write-docs")
    chosen = list(map(Mode, modes)) or list(Mode)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    say(f"seed {seed}")
    try:
        records = load(options.keep, TESTS) if options.keep and options.keep.exists() else []
        for kind in kinds if options.rounds else ():
            for one in play(
                kind, rounds_of(parties, options.rounds), seed, only, chosen, options.lanes, options.host_fs
            ):
                records.append(one)
                if options.keep:
                    keep(options.keep, one)
    except LabError as error:
        print(f"litmus: {error}", file=sys.stderr)
        return 1
    return 0 if publish(records, options.write_docs) else 1


if __name__ == "__main__":
    sys.exit(main())
