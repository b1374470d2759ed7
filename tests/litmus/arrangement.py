"""Who takes which part, and what is then expected of each mode."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.litmus.arena import Arena
from tests.litmus.litmus import Litmus, Mode, Shows, problems
from tests.litmus.run import Outcomes, Player, Run, Seen, play, prepare

LEASE_MAX, LEASE_MARGIN = 0.5, 0.2
"""Seconds: the backends' --lease-max and --lease-margin. Shorter leases than usual, as changes wait for them; a longer
margin, as many tests at once load a machine."""
LEASE_OPTIONS = ("--lease-max", str(LEASE_MAX), "--lease-margin", str(LEASE_MARGIN))
TICKS = 0.02
"""Seconds of the margin that a guest's clock takes: two ticks of 100 Hz."""
SLACK = 1.0
"""Seconds that a loaded machine may need beyond what is promised."""
ENOUGH = 20
"""Rounds, of which some must prove something."""
SETTLE = {
    Mode.NONE: 0.0,
    Mode.AUTO: 1.0 + SLACK,
    Mode.ALWAYS: 0.0,
    Mode.SHARED: LEASE_MAX + SLACK,
    Mode.AWARE: SLACK,
    Mode.DAX: LEASE_MAX + SLACK,
}
"""Seconds after which a guest has seen a change made on the host; `always` never has."""
OLD_ENOUGH = 4 * LEASE_MAX + 0.1
"""Seconds after which leases on something are as long as they can be: a quarter of its age."""
LEASES = (Mode.SHARED, Mode.MIXED, Mode.DAX)
"""Modes in which changes wait for leases."""
LANES, SETTLE_LANES = 4, 64
"""How many rounds go on at once where nobody waits, and where a party waits for the time above."""


class Arrangement(enum.Enum):
    """Who takes part; the value is for people."""

    GUESTS = "guests only"
    GUEST_CHANGES = "guest 2 changes, the host looks"
    HOST_CHANGES = "the host changes, guest 2 looks at once"
    HOST_CHANGED = "the host changes, guest 2 looks when the promised time is over"

    def players(self, arena: Arena, mode: Mode) -> Sequence[Player]:
        """Party 1, 2, ..."""
        guests = arena.guests(mode)
        if self is Arrangement.GUESTS:
            return guests
        return (guests[1], arena.host) if self is Arrangement.GUEST_CHANGES else (arena.host, guests[1])

    def tests(self, tests: Sequence[Litmus]) -> tuple[Litmus, ...]:
        """Those that can be played so."""
        if self is Arrangement.GUESTS:
            return tuple(tests)
        if self is Arrangement.GUEST_CHANGES:
            return tuple(test for test in tests if test.one_changes)
        # When the time is over: the order of several changes is not promised, an old copy of one may be used while
        # another is seen.
        return tuple(
            test
            for test in tests
            if test.by_host and (test.told if self is Arrangement.HOST_CHANGED else test.one_changes)
        )

    def shows(self, test: Litmus, mode: Mode) -> Shows:
        """What a mode does with a test's stale outcomes."""
        shows = test.shows(mode)
        if self is Arrangement.GUESTS or mode is Mode.NONE:
            return shows
        if self is Arrangement.GUEST_CHANGES or (mode is Mode.DAX and test.memory):
            return Shows.NEVER
        if mode is Mode.ALWAYS:
            return shows
        if self is Arrangement.HOST_CHANGED:
            return Shows.MAY if test.without_name and mode is Mode.AWARE else Shows.NEVER
        if mode is Mode.AUTO:
            # The rounds are few, and it has been shown between guests.
            return Shows.MAY if shows is Shows.MUST else shows
        return Shows.MAY


@dataclass(frozen=True)
class Played:
    """What was seen in one mode.

    Attributes:
        tests: what was played.
        seen: what was seen, for each test.
    """

    arrangement: Arrangement
    mode: Mode
    tests: tuple[Litmus, ...]
    seen: Seen

    def with_more(self, other: Played) -> Played:
        """This and what another run saw of tests in the same arrangement and mode."""
        tests = tuple(dict.fromkeys((*self.tests, *other.tests)))
        seen: Seen = {}
        for test in tests:
            seen[test.name] = total = Outcomes()
            for one in (self, other):
                total.add(one.seen.get(test.name, Outcomes()))
        return Played(self.arrangement, self.mode, tests, seen)

    def problems(self) -> list[str]:
        """What is not as expected."""
        return [
            f"{self.arrangement.value}, {self.mode}: {problem}"
            for test in self.tests
            for problem in self._problems(test, self.seen[test.name])
        ]

    def _problems(self, test: Litmus, seen: Outcomes) -> list[str]:
        found = problems(test, self.arrangement.shows(test, self.mode), seen.judged)
        # Nothing is promised of these but what holds in each mode.
        found += problems(test, Shows.MAY, seen.disturbed)
        if self.mode is Mode.ISOLATED and test.told and seen.rounds >= ENOUGH and not test.stale & set(seen.judged):
            found.append(f"{test.name}: no stale outcome was seen, so it proves nothing in shared: {dict(seen.judged)}")
        if seen.rounds >= ENOUGH and not seen.judged:
            found.append(f"{test.name}: all {seen.rounds} rounds were disturbed, so it proves nothing")
        return found


def perform(
    arena: Arena,
    arrangement: Arrangement,
    *,
    rounds: int,
    seed: int,
    only: frozenset[str] = frozenset(),
    lanes: int = 0,
) -> Iterator[Played]:
    """Play all tests of an arrangement, mode by mode.

    Args:
        arena: the guests.
        rounds: of each test.
        seed: of the random delays.
        only: names of tests; empty: all.
        lanes: how many rounds go on at once where changes wait for leases; 0: as many as such guests can.
    """
    tests = tuple(test for test in arrangement.tests(arena.tests) if not only or test.name in only)
    if not tests:
        return
    modes = arena.modes if arrangement is Arrangement.GUESTS else arena.host_modes
    folder = f"{arrangement.name.lower()}-{seed:x}"
    # All places at once: while one mode is played, those of the next become old enough for long leases.
    for mode in modes:
        prepare(arena.root / mode / folder, tests, rounds)
    prepared = time.monotonic()
    for mode in modes:
        if mode in LEASES:
            time.sleep(max(0.0, prepared + OLD_ENOUGH - time.monotonic()))
        settle = SETTLE[mode] if arrangement is Arrangement.HOST_CHANGED else 0.0
        run = Run(
            side=arena.side,
            mode=mode,
            folder=folder,
            tests=sorted(tests, key=lambda test: -len(test.parties)),
            rounds=rounds,
            lanes=_lanes(mode, settle, lanes or arena.lease_lanes),
            seed=seed,
            settle_ms=round(settle * 1000),
            slowest=LEASE_MARGIN - TICKS if mode in LEASES else math.inf,
        )
        seen = play(run, arrangement.players(arena, mode), arena.root)
        yield Played(arrangement, mode, tests, seen)


def _lanes(mode: Mode, settle: float, lease_lanes: int) -> int:
    if settle and mode is not Mode.DAX:
        return SETTLE_LANES
    return lease_lanes if mode in LEASES else LANES
