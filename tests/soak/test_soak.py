"""User-space guests with small DAX windows, all of them busy and some of them killed: nothing is wrong, nothing left.

The long one takes its size from the environment: SOAK_SECONDS, SOAK_SEED.
"""

from __future__ import annotations

import os

import pytest

from tests.soak.content import make, misplaced
from tests.soak.run import Report, Settings, soak
from tests.views import need_views

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
SLOW = 300
"""Seconds more that it may take on a slow machine."""


def run(settings: Settings) -> Report:
    """Make a run, which must not do nothing."""
    need_views()
    report = soak(settings, print)
    print(report)
    assert report.counts["compared"] + report.counts["examined"] > 0
    return report


@pytest.mark.slow
@pytest.mark.timeout(SLOW)
def test_for_some_seconds() -> None:
    report = run(Settings(guests=3, seconds=6, kill_every=1.2, audit_every=2))
    assert report.kills


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + SLOW)
def test_for_long() -> None:
    report = run(Settings(seconds=SECONDS, seed=SEED))
    assert report.kills["daemon"]
    assert report.audits > 1


def test_what_belongs_to_another_place_is_known_for_that() -> None:
    """Otherwise a run proves nothing."""
    for offset, length in ((0x12340, 8), (0x12343, 50), (0x10FFF, 4099)):
        data = make(3, offset, length, 1, 7)
        assert misplaced(3, offset, data) == []
        assert misplaced(3, offset, bytes(length)) == []
        assert misplaced(4, offset, data)
        assert misplaced(3, offset + 4096, data)
    torn = bytearray(make(3, 64, 16, 1, 7))
    torn[2:9] = bytes(7)
    assert misplaced(3, 64, bytes(torn)) == []
