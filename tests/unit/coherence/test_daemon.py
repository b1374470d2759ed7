"""What coherenced asks of the system before it serves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.main import _run_first
from coherent_vfs.coherence.daemon.service import Service
from coherent_vfs.coherence.shm.paths import DomainPaths
from tests.unit.coherence.other_kinds import OTHER_KINDS, remove


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


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["table", "leases", "lock"])
@pytest.mark.parametrize("make", OTHER_KINDS)
def test_what_is_no_regular_file_is_refused(
    paths: DomainPaths, tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    path: Path = getattr(paths, name)
    make(path)
    try:
        with pytest.raises(UserError, match=f"{path}: not a regular file: remove it"):
            Service(paths, 1024, tmp_path / "s", 0o600, None)
    finally:
        remove(path)
