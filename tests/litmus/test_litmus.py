"""The litmus tests on every kind of guest; `python -m tests.litmus` plays more rounds, and can write the document."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager

import pytest

from tests.coarse_file_system import MAKERS, CannotMount
from tests.lab import assets
from tests.lab.paths import LabError
from tests.litmus.arena import Arena, stock_guests, user_space_guests
from tests.litmus.arrangement import LEASE_OPTIONS, Arrangement, Played, perform
from tests.litmus.catalogue import ALL
from tests.litmus.litmus import Mode, operation
from tests.litmus.mapped import MAPPED
from tests.litmus.run import Outcomes
from tests.litmus.side_channel import SideChannel
from tests.views import need_views

ROUNDS = {"user-space": 4, "uml": 4, "qemu": 3, "qemu-dax": 3}
ARRANGEMENTS = {
    "user-space": tuple(Arrangement),
    # To look at once after a change of the host proves less than to look when the promised time is over.
    "uml": tuple(one for one in Arrangement if one is not Arrangement.HOST_CHANGES),
    # QEMU runs the kernel of User-Mode Linux, but slower.
    "qemu": (Arrangement.GUESTS,),
    "qemu-dax": tuple(Arrangement),
}
PROVEN = frozenset(Mode) - {Mode.ISOLATED}
"""Modes in which few rounds are enough to show what is expected."""
LONG_ROUNDS = {"user-space": 100, "uml": 150, "qemu": 60, "qemu-dax": 100}


def guests(kind: str, modes: Collection[Mode] = PROVEN, host_fs: str = "") -> AbstractContextManager[Arena]:
    """Guests that have a share in each mode; those that were not fetched are skipped."""
    if kind == "user-space":
        return user_space_guests(LEASE_OPTIONS, modes, host_fs)
    try:
        _ = assets.uml_kernel() if kind == "uml" else assets.cloud_kernel()
        _ = kind != "qemu-dax" or assets.qemu_dax()
    except LabError as error:
        pytest.skip(str(error))
    if kind == "qemu-dax":
        need_views()
    return stock_guests(kind, LEASE_OPTIONS, modes, host_fs)


def play_all(kind: str, rounds: Mapping[Arrangement, int], modes: Collection[Mode] = PROVEN, host_fs: str = "") -> None:
    """Play the tests of arrangements in all modes; every outcome must be one that its mode may have."""
    # Other delays each time: a rare outcome may need many runs. The seed is told, so that it can be played again.
    seed = secrets.randbits(32)
    with guests(kind, modes, host_fs) as arena:
        found = [
            problem
            for arrangement, number in rounds.items()
            for played in perform(arena, arrangement, rounds=number, seed=seed)
            for problem in played.problems()
        ]
    assert not found, f"seed {seed}: " + "; ".join(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "qemu" else ()) for kind in ROUNDS]
)
def test_outcomes(kind: str) -> None:
    play_all(kind, dict.fromkeys(ARRANGEMENTS[kind], ROUNDS[kind]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("host_fs", MAKERS)
def test_outcomes_on_a_file_system_with_coarse_times(host_fs: str) -> None:
    try:
        play_all("uml", {Arrangement.GUESTS: 8}, [Mode.SHARED], host_fs)
    except CannotMount as error:
        pytest.skip(str(error))


def test_what_needs_links_is_left_out_where_there_are_none() -> None:
    left_out = {test.name for test in ALL if test.needs_links}
    assert {"told-link", "told-symlink", "told-mode", "told-replace-links"} <= left_out
    assert not {"told-content", "told-unlink", "MP+unlink"} & left_out


@pytest.mark.hours
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", LONG_ROUNDS)
def test_outcomes_of_more_rounds(kind: str) -> None:
    rounds = dict.fromkeys(Arrangement, LONG_ROUNDS[kind] // 4)
    play_all(kind, rounds | {Arrangement.GUESTS: LONG_ROUNDS[kind]})


def test_what_is_wrong_in_each_mode_is_found_in_disturbed_rounds_too() -> None:
    test = next(test for test in ALL if test.stale)
    local, stale = min(test.local), min(test.stale)

    def problems_of(judged: str, disturbed: str) -> list[str]:
        seen = {test.name: Outcomes(Counter({judged: 1}), Counter({disturbed: 1}))}
        return Played(Arrangement.GUESTS, Mode.SHARED, (test,), seen).problems()

    assert problems_of(local, stale) == []
    assert len(problems_of(stale, local)) == 1
    assert len(problems_of(local, "what nobody can see")) == 1


def test_the_catalogue_makes_sense() -> None:
    assert len({test.name for test in ALL + MAPPED}) == len(ALL + MAPPED)
    for test in ALL + MAPPED:
        assert not test.local & test.stale, test.name
        assert len(ALL + MAPPED) * max(LONG_ROUNDS.values()) <= SideChannel.rounds
        values = test.registers + len(test.final)
        assert {len(outcome.split()) for outcome in test.local | test.stale} == {values}, test.name
        steps = [step for party in test.parties for step in party.steps]
        numbers = [int(step.split()[0][1:]) for step in steps if "=" in step.split()]
        assert sorted(numbers) == list(range(test.registers)), test.name
        assert all(operation(step) for step in steps)
