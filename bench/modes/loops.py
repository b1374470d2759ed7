"""What loops.c measures: what repeated looks gain, what a change costs, and what working sets cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

from bench.modes.stage import AUTO, DOUBLE, HALF, NEVER, NONE, SHARED, Loop, Mode, Stage

LOOKS: Mapping[str, tuple[str, int]] = {
    "stat of one file": ("stat", 1),
    "stat of 100 files in turn": ("stat", 100),
    "open+close of one file": ("open", 1),
    "open+close of 100 files in turn": ("open", 100),
    "stat of 100 names that do not exist": ("missing", 100),
}
"""Rows of the gain: operation of loops.c and number of files."""
CHANGES: Mapping[str, str] = {
    "write 4 KiB in place": "write",
    "create+unlink": "create",
    "rename, and back": "rename",
    "chmod": "chmod",
}
GAIN_MODES = (NONE, SHARED, NEVER, AUTO)
CHANGE_MODES = (NONE, SHARED, AUTO)
LEASE_MODES = (HALF, SHARED, DOUBLE)
SETS = (100, 1000, 10000)
CHANGED = 80
"""Changes that meet leases, in each mode."""


@dataclasses.dataclass(frozen=True)
class Waits:
    """How long changes waited that met leases of the other guest, in milliseconds.

    Attributes:
        held: How many had to wait, by the backend's account.
        each: Latency of each.
    """

    held: int
    each: Sequence[float]


@dataclasses.dataclass(frozen=True)
class LoopResults:
    """Everything that loops.c measured: for each title and mode, one result for each round; of `sets`, one by number
    of files and mode."""

    looks: Mapping[tuple[str, Mode], Sequence[Loop]]
    changes: Mapping[tuple[str, Mode], Sequence[Loop]]
    waits: Mapping[Mode, Waits]
    sets: Mapping[tuple[int, Mode], Loop]


def prepare(stage: Stage) -> None:
    """Make what is looked at and changed; it has to age before it is measured."""
    stage.make_files("gain", 100)
    stage.make_files("set", max(SETS))
    for mode in CHANGE_MODES:
        stage.make_files(f"changed-{mode.name}", 1)
    for mode in LEASE_MODES:
        stage.make_folders(f"leased-{mode.name}", CHANGED)


def measure(stage: Stage, rounds: int, seconds: float) -> LoopResults:
    """Measure all, alternating.

    Args:
        stage: Where prepare was called, and then age.
        rounds: How often.
        seconds: Of each loop.
    """
    looks: dict[tuple[str, Mode], list[Loop]] = {}
    changes: dict[tuple[str, Mode], list[Loop]] = {}
    for number in range(rounds):
        stage.say(f"round {number + 1} of {rounds}: looks")
        for title, (operation, files) in LOOKS.items():
            for mode in turned(GAIN_MODES, number):
                looks.setdefault((title, mode), []).append(stage.loop(operation, mode, "gain", files, seconds))
        stage.say(f"round {number + 1} of {rounds}: changes that meet no lease")
        for title, operation in CHANGES.items():
            # Short loops that alternate often: the difference that is looked for is small.
            for repetition in range(8):
                for mode in turned(CHANGE_MODES, repetition):
                    loop = stage.loop(operation, mode, f"changed-{mode.name}", 1, seconds / 8)
                    changes.setdefault((title, mode), []).append(loop)
    # These are compared with nothing else, and take long: once.
    stage.say("working sets")
    sets = {(files, mode): stage.loop("stat", mode, "set", files, seconds) for files in SETS for mode in LEASE_MODES}
    stage.say("changes that meet leases")
    waits = {mode: _wait(stage, mode, f"leased-{mode.name}") for mode in LEASE_MODES}
    return LoopResults(looks, changes, waits, sets)


def _wait(stage: Stage, mode: Mode, folder: str) -> Waits:
    """The other guest goes on looking at what this one changes, so it holds leases all the time."""
    held = stage.counters(mode)["held"]
    hold = f"/run/loops hold /run/{mode.name} {folder} {CHANGED} 3600"
    stage.other.check(f"{hold} >/dev/null 2>&1 & echo $! >/run/holder")
    time.sleep(2)
    try:
        latencies = stage.looker.check(f"/run/loops change /run/{mode.name} {folder} {CHANGED} 0", timeout=300)
    finally:
        stage.other.check("kill $(cat /run/holder)")
    return Waits(stage.counters(mode)["held"] - held, [int(line) / 1e3 for line in latencies.split()])


def turned(modes: Sequence[Mode], number: int) -> list[Mode]:
    """The modes, with another one first in each round."""
    first = number % len(modes)
    return [*modes[first:], *modes[:first]]


def mean(loops: Sequence[Loop]) -> float:
    """Median over the rounds of the mean time: what happens only now and then, as a lease's renewal, counts."""
    return statistics.median(loop.mean for loop in loops)
