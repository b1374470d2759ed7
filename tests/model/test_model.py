"""The models of the protocol in docs/development/model, checked by Spin: the good hold, every bad variant is caught."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

MODELS = Path(__file__).parents[2] / "docs/development/model"
DEPTH = 1_000_000
MEGABYTES = 4096


class Verdict(NamedTuple):
    """What pan found.

    Attributes:
        errors: how many; it stops at the first.
        states: how many it visited.
        output: all that it said.
    """

    errors: int
    states: int
    output: str


def verify(model: str, macros: tuple[str, ...], directory: Path, optimise: str = "-O1") -> Verdict:
    """Check a model exhaustively; a search that is cut off, or does not compile, fails the test.

    Args:
        model: its file, without ".pml".
        macros: defined for it. LIVENESS asks for its ltl property under weak fairness, otherwise assertions
            and invalid end states are looked for.
        directory: where to build.
        optimise: what gcc is to do; a short search is sooner done with "-O0".
    """
    liveness = "LIVENESS" in {macro.split("=")[0] for macro in macros}
    source = MODELS / f"{model}.pml"
    _run(["spin", "-a", *(f"-D{macro}" for macro in macros), str(source)], directory)
    kind = ["-DNFAIR=4"] if liveness else ["-DSAFETY"]
    _run(["gcc", optimise, "-w", f"-DMEMLIM={MEGABYTES}", *kind, "-o", "pan", "pan.c"], directory)
    output = _run(["./pan", f"-m{DEPTH}", *(["-a", "-f"] if liveness else [])], directory)
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    assert errors is not None, output
    assert states is not None, output
    looked_for = "never claim" if liveness else "assertion violations"
    assert re.search(rf"{looked_for}\s+\+", output) is not None, output
    # Spin goes on after these, without having seen everything.
    for cut in ("max search depth too small", "out of memory", "reached -DMEMLIM", "Search not completed", "aborting"):
        if errors[1] == "0" or cut != "Search not completed":
            assert cut not in output, output
    return Verdict(int(errors[1]), int(states[1]), output)


def name(model: str, macros: tuple[str, ...]) -> str:
    """What a run is called."""
    return "-".join((model, *macros))


def _run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=290)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


GOOD = [
    ("table", ()),
    ("floor", ()),
    ("leases", ("N=2", "CHANGES=2")),
    ("leases", ("N=2", "STOPPED")),
    ("leases", ("N=2", "CHANGES=2", "LIVENESS")),
    ("names", ()),
    ("data", ("HOST",)),
    ("deaths", ("CHANGERS=1",)),
    ("deaths", ("DAEMON_DEATHS=0", "STOCK")),
]
LARGER = [
    ("leases", ("N=3",)),
    ("leases", ("N=2", "STOPPED", "LIVENESS")),
    # A change may then wait for ever, which is below; but nothing stale is used.
    ("leases", ("N=2", "CHANGES=2", "GIVE_WHILE_A_CHANGE_WAITS")),
    ("data", ()),
    ("deaths", ("CHANGERS=1", "STOCK")),
    ("deaths", ("DAEMON_DEATHS=0",)),
    ("deaths", ("DAEMON_DEATHS=0", "CHANGERS=1", "STOCK", "NEWCOMER")),
    ("deaths", ("LIVENESS",)),
    ("deaths", ("DAEMON_DEATHS=0", "STOCK", "LIVENESS")),
]
"""What takes longer, or says little more: part of the longer suite."""


@pytest.mark.parametrize(
    ("model", "macros"),
    [
        *(pytest.param(*good, id=name(*good)) for good in GOOD),
        *(pytest.param(*good, id=name(*good), marks=pytest.mark.slow) for good in LARGER),
    ],
)
def test_the_protocol_holds(model: str, macros: tuple[str, ...], tmp_path: Path) -> None:
    verdict = verify(model, macros, tmp_path)
    print(f"{model} {' '.join(macros)}: {verdict.states} states")
    assert verdict.errors == 0, verdict.output
    # So small a model would show nothing: something in it would have been switched off.
    assert verdict.states > 1000


ASSERTION = "assertion violated"
CYCLE = "acceptance cycle"

BAD = [
    ("table", ("STAMP_AFTER_THE_REPLY",), ASSERTION),
    ("table", ("BUMP_AFTER_THE_REPLY",), ASSERTION),
    ("table", ("BUMP_BEFORE_THE_CALL",), ASSERTION),
    ("table", ("BUMP_STORES",), ASSERTION),
    ("leases", ("N=2", "STAMP_AFTER_THE_READ"), ASSERTION),
    ("leases", ("N=2", "NO_SECOND_LOOK"), ASSERTION),
    ("leases", ("N=2", "SLOT_BEFORE_LOCK"), ASSERTION),
    ("leases", ("N=2", "WITHDRAW"), ASSERTION),
    ("leases", ("N=2", "NO_LOOK_FOR_LEASES"), ASSERTION),
    ("leases", ("N=2", "BUMP_BEFORE_THE_CALL"), ASSERTION),
    ("leases", ("N=2", "UNLOCK_BEFORE_BUMP"), ASSERTION),
    ("leases", ("N=2", "STOPPED", "UNLOCK_WITHOUT_THE_CLOCK"), ASSERTION),
    ("leases", ("N=2", "LIVENESS", "GIVE_WHILE_A_CHANGE_WAITS"), CYCLE),
    ("leases", ("N=2", "STOPPED", "LIVENESS", "NEWER_LEASES_WAITED_FOR"), CYCLE),
    ("leases", ("N=2", "LIVENESS", "CLOSED_ENDS_WITH_THE_LEASES"), CYCLE),
    ("names", ("VICTIM_OF_BEFORE_THE_LOCK",), ASSERTION),
    ("floor", ("LIFT_LEAVES_A_DISTRUST",), ASSERTION),
    ("floor", ("LIFT_ENDS_A_DISTRUST",), ASSERTION),
    ("floor", ("RAISE_TAKES_ITS_NUMBER_FIRST",), ASSERTION),
    ("data", ("DATA_WORD_WRITTEN_ONCE", "TOLD_ALWAYS_ADVANCES"), ASSERTION),
    ("data", ("HOST", "DATA_WORD_WRITTEN_ONCE"), ASSERTION),
    ("data", ("STAMP_AFTER_AN_OWN_CHANGE",), ASSERTION),
    ("data", ("SPOILT_ONLY_AFTER_THE_REPLY",), ASSERTION),
    ("deaths", ("CHANGERS=1", "NO_JOURNAL"), ASSERTION),
    ("deaths", ("CHANGERS=1", "CLEAR_BEFORE_BUMP"), ASSERTION),
    ("deaths", ("CHANGERS=1", "ANNOUNCE_AFTER_CALL"), ASSERTION),
    ("deaths", ("CHANGERS=1", "NO_DISTRUST"), ASSERTION),
    ("deaths", ("CHANGERS=1", "FLOOR_BEFORE_ALL_ARE_BACK"), ASSERTION),
    ("deaths", ("CHANGERS=1", "DAEMON_DEATHS=0", "STOCK", "RELEASE_BEFORE_BUMP"), ASSERTION),
    ("deaths", ("CHANGERS=1", "DAEMON_DEATHS=0", "STOCK", "NEWCOMER", "HOLDER_REUSED"), ASSERTION),
    ("deaths", ("DAEMON_DEATHS=0", "LIVENESS", "NO_RELEASE"), CYCLE),
]


@pytest.mark.parametrize(("model", "macros", "found"), BAD, ids=[name(*bad[:2]) for bad in BAD])
def test_a_bad_variant_is_caught(model: str, macros: tuple[str, ...], found: str, tmp_path: Path) -> None:
    verdict = verify(model, macros, tmp_path, "-O0")
    assert verdict.errors == 1, verdict.output
    assert found in verdict.output
    assert (tmp_path / f"{model}.pml.trail").exists()
