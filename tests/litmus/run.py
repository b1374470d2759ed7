"""Play tests: every party does its part of all rounds, then the outcomes are counted."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from tests.lab.paths import LabError
from tests.litmus import places
from tests.litmus.litmus import Litmus, Mode, Party
from tests.litmus.side_channel import SLOWEST_CHANGE, SLOWEST_LOOK, SideChannel

WAITED = 0.1
"""Seconds: a change that took so long has waited for a lease."""


@dataclasses.dataclass
class Outcomes:
    """What was seen of a test.

    Attributes:
        judged: how often each outcome was seen.
        disturbed: the same of rounds in which a look took so long that nothing is promised about them.
        waited: in how many of the judged rounds a change waited for a lease.
    """

    judged: Counter[str] = dataclasses.field(default_factory=Counter)
    disturbed: Counter[str] = dataclasses.field(default_factory=Counter)
    waited: int = 0

    @property
    def rounds(self) -> int:
        """How many were played."""
        return self.judged.total() + self.disturbed.total()

    def add(self, others: Outcomes) -> None:
        """Add what was seen in another run."""
        self.judged += others.judged
        self.disturbed += others.disturbed
        self.waited += others.waited


Seen = dict[str, Outcomes]
"""For each test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Some tests, played together in one mode.

    Attributes:
        side: the side channel.
        mode: how the guests cache.
        folder: where the places are, in the mode's directory; no guest may know it from another run.
        tests: one after the other, those with most parties first: who has no part in the others is done then.
        rounds: of each test.
        lanes: how many rounds go on at once.
        seed: of the random delays.
        settle_ms: how long after a change it must have been seen.
        slowest: seconds that a look may take, so that the round is judged. A lease counts for a guest from when
            the guest processes the reply: one that takes longer than the margin may outlast the lease.
    """

    side: SideChannel
    mode: Mode
    folder: str
    tests: Sequence[Litmus]
    rounds: int
    lanes: int
    seed: int
    settle_ms: int = 0
    slowest: float = math.inf

    @property
    def parties(self) -> int:
        return max(len(test.parties) for test in self.tests)

    def part(self, test: Litmus, number: int) -> Party:
        """What a party, from 1, does in a test; nothing, where the test has no such party."""
        return test.parties[number - 1] if number <= len(test.parties) else Party()


class Player(Protocol):
    """Who can take the part of a party."""

    def play(self, run: Run, number: int) -> None:
        """Do all rounds of a run as party `number`, from 1; raises when that does not work."""


def prepare(root: Path, tests: Sequence[Litmus], rounds: int) -> None:
    """Make the places of a run on the host; the older they are, the longer leases are given on them."""
    for test in tests:
        places.prepare(root, test, rounds)


def play(run: Run, players: Sequence[Player], root: Path) -> Seen:
    """Play a run whose places have been prepared, count the outcomes, and remove the places.

    Args:
        run: the run.
        players: for party 1, 2, ...
        root: on the host; the directory of each mode is in it.
    """
    root = root / run.mode / run.folder
    run.side.reset(len(run.tests) * run.rounds)
    with ThreadPoolExecutor(run.parties) as pool:
        playing = [pool.submit(player.play, run, n) for n, player in enumerate(players[: run.parties], start=1)]
    if errors := [error for played in playing if (error := played.exception())]:
        raise LabError(f"mode {run.mode} cannot be played: {'; '.join(map(str, errors))}") from errors[0]
    seen: Seen = {}
    for position, test in enumerate(run.tests):
        outcomes = seen[test.name] = Outcomes()
        for round_ in range(run.rounds):
            index = position * run.rounds + round_
            outcome = f"{run.side.outcome(index, test)} {places.final(root, test, round_)}".rstrip()
            in_time = test.memory or run.side.slowest(index, SLOWEST_LOOK) <= run.slowest
            counted = outcomes.judged if in_time else outcomes.disturbed
            counted[outcome] += 1
            outcomes.waited += in_time and run.side.slowest(index, SLOWEST_CHANGE) > WAITED
        places.remove(root, test)
    return seen


def error_number(error: OSError) -> int:
    """A register's value for an error."""
    return -(error.errno or errno.EIO)
