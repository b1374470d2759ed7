"""What coherenced asks of the system before it serves."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from coherent_vfs.coherence.daemon.main import _run_first


def test_realtime_is_the_lowest_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "sched_setscheduler", lambda pid, policy, param: asked.append((pid, policy, param.sched_priority))
    )
    _run_first()
    assert asked == [(0, os.SCHED_FIFO, 1)]


def test_where_realtime_is_not_permitted_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    _run_first()
    expect_log("not realtime")
