"""Stock guests and random changes: in `shared` nothing is ever stale; in other modes the same test finds what is.

The long ones take their size from the environment: TORTURE_CHANGES, TORTURE_SEED, TORTURE_KILL_EVERY (seconds).
"""

from __future__ import annotations

import os

import pytest

from tests.coarse_file_system import MAKERS, CannotMount
from tests.lab import assets
from tests.lab.paths import LabError
from tests.torture.context import Odds
from tests.torture.domain import Plan
from tests.torture.report import Report
from tests.torture.run import Settings, torture

CHANGES = int(os.environ.get("TORTURE_CHANGES", "100000"))
SEED = int(os.environ.get("TORTURE_SEED", "1"))
KILL_EVERY = float(os.environ.get("TORTURE_KILL_EVERY", "3"))
LONGEST = 3000
"""Seconds of a long test."""
SHORT = 200
"""Seconds that a short one may take on a slow machine; on a quiet one it takes less than ten."""

pytestmark = pytest.mark.timeout(SHORT + 100)


@pytest.fixture(autouse=True)
def fetched(request: pytest.FixtureRequest) -> None:
    """Skip what needs a kind of guest that was not fetched."""
    try:
        _ = assets.cloud_kernel() if "qemu" in request.node.name else assets.uml_kernel()
    except LabError as error:
        pytest.skip(str(error))


def nothing_stale(report: Report, settings: Settings) -> None:
    """The whole run was made, under leases, and nothing in it was stale."""
    print(report)
    assert report.stale == []
    assert report.changes >= settings.changes
    assert report.checks > 3 * report.changes
    assert report.busy_renames < 0.05 * report.changes + 5
    # What no machine can promise whose guests get no processor for as long as a lease margin.
    assert len(report.late) < 0.001 * report.checks + 0.1 * report.after_slow
    # It proves nothing where nobody has anything in the cache, or no change meets a lease.
    assert report.counted("held") > 0
    assert report.cached > 0


def test_nothing_is_stale_in_user_mode_linux() -> None:
    settings = Settings(plan=Plan(kind="uml", contexts=32), changes=900, seconds=SHORT)
    nothing_stale(torture(settings), settings)


def test_nothing_is_stale_in_qemu() -> None:
    settings = Settings(plan=Plan(kind="qemu", contexts=24), changes=250, odds=Odds(looks=5), seconds=SHORT)
    nothing_stale(torture(settings), settings)


def test_nothing_is_stale_while_backends_and_the_daemon_are_killed() -> None:
    settings = Settings(plan=Plan(kind="uml", guests=3, contexts=32), changes=800, kill_every=1.0, seconds=SHORT)
    report = torture(settings)
    nothing_stale(report, settings)
    assert report.daemon_kills
    assert report.backend_kills
    assert report.races


@pytest.mark.parametrize("host_fs", MAKERS)
def test_nothing_is_stale_on_a_file_system_with_coarse_times(host_fs: str) -> None:
    settings = Settings(plan=Plan(kind="uml", contexts=24, host_fs=host_fs), changes=500, seconds=SHORT)
    try:
        nothing_stale(torture(settings), settings)
    except CannotMount as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("cache", ["auto", "always"])
def test_the_same_finds_what_another_mode_is_stale_about(cache: str) -> None:
    report = torture(Settings(plan=Plan(kind="uml", contexts=4, cache=cache), changes=200, seconds=SHORT))
    found = " ".join(report.stale)
    for way in ["lstat", "open", *(["list"] if cache == "always" else [])]:
        assert f" {way} c" in found
    for field in ("error", "mtime", "size", "content"):
        assert f" {field} " in found


def test_the_same_finds_what_is_stale_when_nobody_waits_for_leases() -> None:
    plan = Plan(kind="uml", contexts=16, isolated=True)
    report = torture(Settings(plan=plan, changes=300, odds=Odds(warm=0.5), seconds=SHORT))
    found = " ".join(report.stale)
    for way in ["lstat", "open"]:
        assert f" {way} c" in found
    assert report.cached > 0


@pytest.mark.hours
@pytest.mark.timeout(LONGEST + 120)
@pytest.mark.parametrize("leases", [(1.0, 0.2), (0.4, 0.2)], ids=["default leases", "short leases"])
@pytest.mark.parametrize("kill_every", [0.0, KILL_EVERY], ids=["alive", "killed"])
@pytest.mark.parametrize("kind", ["uml", "qemu"])
def test_a_hundred_thousand_changes(kind: str, kill_every: float, leases: tuple[float, float]) -> None:
    lease_max, lease_margin = leases
    settings = Settings(
        plan=Plan(
            kind=kind,
            guests=3 if kill_every else 2,
            contexts=64,
            lease_max=lease_max,
            lease_margin=lease_margin,
        ),
        changes=CHANGES,
        seed=SEED,
        odds=Odds(looks=5),
        kill_every=kill_every,
        seconds=LONGEST,
    )
    nothing_stale(torture(settings, print), settings)
