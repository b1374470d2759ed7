"""What runs have seen, kept in a file: so many short runs make one document."""

from __future__ import annotations

import datetime
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from tests.lab.paths import CHECKOUT, LabError
from tests.litmus.arrangement import Arrangement, Played
from tests.litmus.litmus import Litmus, Mode
from tests.litmus.run import Outcomes


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """What was seen in one mode by one run: a line of the file.

    Attributes:
        kind: of guests.
        day, commit: of the run, ISO date and short name.
        judged, disturbed, waited: as in Outcomes, for each test.
    """

    kind: str
    arrangement: Arrangement
    mode: Mode
    day: str
    commit: str
    seed: int
    judged: dict[str, dict[str, int]]
    disturbed: dict[str, dict[str, int]]
    waited: dict[str, int]

    def played(self, tests: Mapping[str, Litmus]) -> Played:
        """The same, with the tests of these names."""
        return Played(
            self.arrangement,
            self.mode,
            tuple(test for name, test in tests.items() if name in self.judged),
            {
                name: Outcomes(Counter(self.judged[name]), Counter(self.disturbed[name]), self.waited[name])
                for name in self.judged
            },
        )


def record(kind: str, seed: int, played: Played) -> Record:
    """A record of what was played just now."""
    return Record(
        kind=kind,
        arrangement=played.arrangement,
        mode=played.mode,
        day=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=_commit(),
        seed=seed,
        judged={name: dict(outcomes.judged) for name, outcomes in played.seen.items()},
        disturbed={name: dict(outcomes.disturbed) for name, outcomes in played.seen.items()},
        waited={name: outcomes.waited for name, outcomes in played.seen.items()},
    )


def keep(file: Path, record: Record) -> None:
    """Append a record."""
    with file.open("ab") as lines:
        lines.write(msgspec.json.encode(record) + b"\n")


def load(file: Path, names: Iterable[str]) -> list[Record]:
    """All records of a file.

    Raises:
        LabError: it is not there, or has something else, or other tests than those with these names.
    """
    try:
        found = [msgspec.json.decode(line, type=Record) for line in file.read_bytes().splitlines()]
    except (OSError, msgspec.MsgspecError) as error:
        raise LabError(f"{file}: {error}; --keep makes such a file") from error
    if unknown := {name for one in found for name in one.judged} - set(names):
        raise LabError(f"{file}: it has tests that are no more ({', '.join(sorted(unknown))}): play them anew")
    return found


def added_up(records: Iterable[Record], tests: Mapping[str, Litmus]) -> list[Played]:
    """What all runs saw, for each arrangement and mode, in order."""
    total: dict[tuple[Arrangement, Mode], Played] = {}
    for one in records:
        played = one.played(tests)
        key = played.arrangement, played.mode
        total[key] = total[key].with_more(played) if key in total else played
    order = [(arrangement, mode) for arrangement in Arrangement for mode in Mode]
    return [total[key] for key in order if key in total]


def told(records: Iterable[Record]) -> str:
    """When, of which commits, and with which seeds runs were made."""
    records = list(records)
    seeds = sorted({one.seed for one in records})
    days, commits = (
        ", ".join(dict.fromkeys(words)) for words in zip(*((r.day, r.commit) for r in records), strict=True)
    )
    return f"{days}; commits {commits}; seeds {', '.join(map(str, seeds))}"


def _commit() -> str:
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
