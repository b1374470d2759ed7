"""The litmus tests on every kind of guest; `python -m tests.litmus` plays more rounds and writes docs/litmus.md."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.lab import assets
from tests.lab.paths import LabError
from tests.litmus.arena import STOCK_MODES, USER_SPACE_MODES, Arena, stock_guests, user_space_guests
from tests.litmus.arrangement import LEASE_OPTIONS, Arrangement, perform
from tests.litmus.catalogue import ALL
from tests.litmus.litmus import operation
from tests.litmus.side_channel import SideChannel

ROUNDS = {"user-space": 10, "uml": 12, "qemu": 4}
LONG_ROUNDS = {"user-space": 100, "uml": 150, "qemu": 60}
SHORT = [
    (kind, arrangement)
    for kind in ROUNDS
    for arrangement in Arrangement
    # QEMU runs the kernel of User-Mode Linux, but slower.
    if kind != "qemu" or arrangement is Arrangement.GUESTS
]
LONG = [(kind, arrangement) for kind in LONG_ROUNDS for arrangement in Arrangement]


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of guests; those that were not fetched are skipped."""
    wanted: str = request.param
    try:
        if wanted != "user-space":
            _ = assets.cloud_kernel() if wanted == "qemu" else assets.uml_kernel()
    except LabError as error:
        pytest.skip(str(error))
    return wanted


@pytest.fixture(scope="module")
def arena(kind: str) -> Iterator[Arena]:
    """Three guests, which have a share in each mode."""
    options = LEASE_OPTIONS
    with user_space_guests(options) if kind == "user-space" else stock_guests(kind, options) as guests:
        yield guests


def play_all(kind: str, arena: Arena, arrangement: Arrangement, rounds: int) -> None:
    """Play the tests of an arrangement in all modes; every outcome must be one that its mode may have."""
    modes = USER_SPACE_MODES if kind == "user-space" else STOCK_MODES
    # Other delays each time: a rare outcome may need many runs. The seed is told, so that it can be played again.
    seed = secrets.randbits(32)
    found = [
        problem
        for played in perform(arena, modes, arrangement, rounds=rounds, seed=seed)
        for problem in played.problems()
    ]
    assert not found, f"seed {seed}: " + "; ".join(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "arrangement"), SHORT, indirect=["kind"])
def test_outcomes(kind: str, arena: Arena, arrangement: Arrangement) -> None:
    play_all(kind, arena, arrangement, ROUNDS[kind])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "arrangement"), LONG, indirect=["kind"])
def test_outcomes_of_more_rounds(kind: str, arena: Arena, arrangement: Arrangement) -> None:
    play_all(kind, arena, arrangement, LONG_ROUNDS[kind] // (1 if arrangement is Arrangement.GUESTS else 4))


def test_the_catalogue_makes_sense() -> None:
    assert len({test.name for test in ALL}) == len(ALL)
    for test in ALL:
        assert not test.local & test.stale, test.name
        assert len(ALL) * max(LONG_ROUNDS.values()) <= SideChannel.rounds
        values = test.registers + len(test.final)
        assert {len(outcome.split()) for outcome in test.local | test.stale} == {values}, test.name
        steps = [step for party in test.parties for step in party.steps]
        numbers = [int(step.split()[0][1:]) for step in steps if "=" in step.split()]
        assert sorted(numbers) == list(range(test.registers)), test.name
        assert all(operation(step) for step in steps)
