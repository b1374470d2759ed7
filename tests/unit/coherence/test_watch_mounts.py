"""Mounts that matter are noticed, others are not."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.daemon.watch.mounts import Mounts
from tests.integration.coherenced_process import open_directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run this as root")


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def mount_tmpfs(path: Path) -> None:
    path.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "none", path)


def umount(path: Path) -> None:
    subprocess.run(["umount", path], check=True)


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


class Watched:
    """A host watch that has been asked for these directories."""

    def __init__(self, *paths: Path) -> None:
        self.identities = {identity(path) for path in paths}

    def devices(self) -> set[int]:
        return {device for device, _ in self.identities}

    def watched(self, identity: tuple[int, int]) -> bool:
        return identity in self.identities


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, so that what others mount meanwhile is elsewhere."""
    path = tmp_path / "a disk"
    mount_tmpfs(path)
    yield path
    subprocess.run(["umount", "-R", "-l", path], check=True)


@pytest.fixture
def share(disk: Path) -> Path:
    """A directory on it, with a directory in it; both are watched."""
    share = disk / "above" / "share"
    (share / "inside" / "deep").mkdir(parents=True)
    return share


class Seen:
    """Counts what is noticed of mounts that may matter to a share."""

    def __init__(self, share: Path, *watched: Path) -> None:
        self._root = os.open(share, os.O_PATH)
        self._calls: list[None] = []
        watch = Watched(*(watched or (share, share / "inside")))
        self._mounts = Mounts(watch, lambda: [self._root], lambda: self._calls.append(None))

    def close(self) -> None:
        self._mounts.close()
        os.close(self._root)

    def __call__(self) -> bool:
        """Whether something was noticed since the last time; at most once."""
        if select.select([self._mounts._epoll.fileno()], [], [], 0)[0]:
            self._mounts.process()
        assert not select.select([self._mounts._epoll.fileno()], [], [], 0)[0]
        count = len(self._calls)
        self._calls.clear()
        assert count <= 1
        return count == 1


@pytest.fixture
def seen(share: Path) -> Iterator[Seen]:
    seen = Seen(share)
    assert not seen()
    yield seen
    seen.close()


def assert_noticed(seen: Callable[[], bool], path: Path, noticed: bool) -> None:
    """Whether a mount there is noticed, and its end."""
    mount_tmpfs(path)
    assert seen() == noticed
    assert not seen()
    umount(path)
    assert seen() == noticed


@pytest.mark.parametrize("where", ["share", "share/inside", "share/inside/deep", "share/new", "."])
def test_at_above_or_below_the_share(share: Path, seen: Seen, where: str) -> None:
    assert_noticed(seen, share.parent / where, True)


@pytest.mark.parametrize("where", ["beside", "share2", "sha", "with a blank\\ \tand more"])
def test_beside_the_share_on_its_file_system(share: Path, seen: Seen, where: str) -> None:
    assert_noticed(seen, share.parent / where, False)


def test_on_another_file_system(tmp_path: Path, seen: Seen) -> None:
    assert_noticed(seen, tmp_path / "elsewhere", False)


def test_in_what_is_mounted_beside_the_share(share: Path, seen: Seen) -> None:
    """Both at once: when they are gone nobody can look any more at what the second one was in."""
    mount_tmpfs(share.parent / "beside")
    mount_tmpfs(share.parent / "beside" / "more")
    assert not seen()
    subprocess.run(["umount", "-R", share.parent / "beside"], check=True)
    assert not seen()


def test_over_what_is_mounted_below_the_share(share: Path, seen: Seen) -> None:
    mount_tmpfs(share / "inside")
    assert seen()
    assert_noticed(seen, share / "inside", True)
    umount(share / "inside")
    assert seen()


def test_the_share_itself_appears_elsewhere(share: Path, seen: Seen) -> None:
    """No name that was cached stands for something else."""
    other = share.parent / "other"
    other.mkdir()
    mount("--bind", share, other)
    assert not seen()
    umount(other)
    assert not seen()


def test_a_mount_that_is_moved(share: Path, seen: Seen) -> None:
    beside, other, inside = share.parent / "beside", share.parent / "other", share / "inside"
    other.mkdir()
    # Mounts on a shared one cannot be moved.
    mount("--make-private", share.parent.parent)
    mount_tmpfs(beside)
    assert not seen()
    mount("--move", beside, other)
    assert not seen()
    mount("--move", other, inside)
    assert seen()
    mount("--move", inside, beside)
    assert seen()
    umount(beside)


def test_what_is_watched_by_another_path_than_the_shares(share: Path) -> None:
    """As after it was moved out of the share, or through another mount of it, here or in a namespace of its own."""
    moved, other = share.parent / "moved", share.parent / "other"
    (moved / "child").mkdir(parents=True)
    other.mkdir()
    mount("--make-private", share.parent.parent)
    mount("--bind", moved, other)
    seen = Seen(share, share, moved)
    assert_noticed(seen, moved / "name", True)
    assert_noticed(seen, other / "name", True)
    # Nothing was cached of that.
    assert_noticed(seen, moved / "child" / "name", False)
    # Mounted over another mount.
    mount_tmpfs(other / "name")
    assert seen()
    assert_noticed(seen, other / "name", True)
    seen.close()


def test_what_cannot_be_looked_at_counts(share: Path, seen: Seen) -> None:
    """The directory that the mount point is in has another name, or is covered, when it is to be looked at."""
    beside, renamed = share.parent / "beside", share.parent / "renamed"
    (beside / "child").mkdir(parents=True)
    mount_tmpfs(beside / "child")
    assert not seen()
    beside.rename(renamed)
    umount(renamed / "child")
    assert seen()
    mount_tmpfs(renamed / "child")
    assert not seen()
    with open_directory(renamed) as covered:
        mount_tmpfs(renamed)
        assert not seen()
        umount(Path(f"/proc/{os.getpid()}/fd/{covered}/child"))
        assert seen()


def test_a_share_that_a_process_of_another_mount_namespace_has(share: Path) -> None:
    """Its path there says nothing here; which directories are watched does."""
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount --bind '{share}' /mnt && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        seen = Seen(Path(f"/proc/{process.pid}/root/mnt"), share, share / "inside")
        assert_noticed(seen, share / "inside", True)
        assert_noticed(seen, share / "inside" / "new", True)
        assert_noticed(seen, share.parent / "beside", False)
        seen.close()


def test_while_nothing_is_watched(share: Path) -> None:
    with open_directory(share) as root:
        calls: list[None] = []
        mounts = Mounts(Watched(), lambda: [root], lambda: calls.append(None))
        mount_tmpfs(share / "inside")
        mounts.process()
        umount(share / "inside")
        mounts.process()
        mounts.close()
    assert not calls
