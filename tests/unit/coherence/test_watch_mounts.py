"""Mounts that matter are noticed, others are not."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherence.watch.mounts import Mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run this as root")


def mount(path: Path) -> None:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)


def umount(path: Path) -> None:
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    mount(tmp_path / "share")
    yield tmp_path / "share"
    umount(tmp_path / "share")


@pytest.fixture
def seen(share: Path) -> Iterator[Callable[[], int]]:
    """Counts what was noticed of mounts that concern the share."""
    calls: list[None] = []
    device = share.stat().st_dev
    mounts = Mounts(lambda: {device}, lambda: calls.append(None))

    def look() -> int:
        if select.select([mounts._epoll.fileno()], [], [], 0)[0]:
            mounts.process()
        assert not select.select([mounts._epoll.fileno()], [], [], 0)[0]
        return len(calls)

    assert look() == 0
    yield look
    mounts.close()


def test_a_mount_inside(share: Path, seen: Callable[[], int]) -> None:
    mount(share / "inside")
    assert seen() == 1
    assert seen() == 1
    umount(share / "inside")
    assert seen() == 2


def test_a_mount_elsewhere(tmp_path: Path, share: Path, seen: Callable[[], int]) -> None:
    mount(tmp_path / "elsewhere")
    assert seen() == 0
    umount(tmp_path / "elsewhere")
    assert seen() == 0


def test_the_share_itself_appears_elsewhere(tmp_path: Path, share: Path, seen: Callable[[], int]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", share, other], check=True)
    assert seen() == 1
    umount(other)
    assert seen() == 2
