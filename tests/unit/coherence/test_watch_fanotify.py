"""The host watch by fanotify, on a file system of the test's own."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.watch import fanotify, fanotify_calls
from coherent_vfs.coherence.daemon.watch.fanotify import FanotifyWatch
from coherent_vfs.coherence.daemon.watch.invalidator import Domain, What
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table
from tests.unit.coherence.watch_world import FakeLeases, slots_above

CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 2, 21
QUEUE = Path("/proc/sys/fs/fanotify/max_queued_events")


def _permitted() -> bool:
    try:
        os.close(fanotify_calls.open_group())
    except OSError:
        return False
    return fanotify_calls.may_open_handles()


pytestmark = pytest.mark.skipif(not _permitted(), reason="fanotify is not permitted here: run this as root")


class World:
    """A watched file system, a table, and what was told."""

    def __init__(self, directory: Path, table: Table, table_path: Path) -> None:
        self.directory = directory
        self.table = table
        self._table_path = table_path
        self.leases = FakeLeases()
        self.seen: list[tuple[str, What, bytes]] = []
        self.domain = Domain(table, self.leases, lambda reason: table.raise_floor())
        self.domain.on_change = lambda who, what, path: self.seen.append((who, what, path))
        self.watch = FanotifyWatch(self.domain)

    def ask(self, path: Path, key: int = 1) -> bool:
        return self.watch.watch(key, os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))

    def inode(self, path: Path) -> int:
        status = path.lstat()
        return self.table.inode_slot(status.st_dev, status.st_ino)

    def name(self, path: Path) -> int:
        return self.table.name_slot(self.inode(path.parent), os.fsencode(path.name))

    def settle(self) -> None:
        """Process all events that there are."""
        seen = -1
        while seen != self.domain.counts.events:
            seen = self.domain.counts.events
            self.watch.process()

    def bumped(self, call: Callable[[], object]) -> set[int]:
        """The slots that were bumped for what the call did."""
        self.settle()
        stamp = self.table.stamp()
        call()
        self.settle()
        return slots_above(self._table_path, stamp)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Path]:
    """An empty file system, so that nobody else changes anything on it."""
    path = tmp_path / "fs"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def world(file_system: Path, table: Table, paths: DomainPaths) -> Iterator[World]:
    world = World(file_system, table, paths.table)
    journal = file_system.with_name("journal")
    journal.touch()
    world.watch.join(1, 5, "red", journal, pid=1 << 30)
    assert world.ask(file_system)
    yield world
    world.watch.close()


def test_create(world: World) -> None:
    path = world.directory / "f"
    assert world.bumped(path.touch) == {world.name(path), world.inode(world.directory), world.inode(path)}
    assert world.seen[0] == ("host", "create", os.fsencode(path))


def test_content(world: World) -> None:
    path = world.directory / "f"
    path.touch()
    assert world.bumped(lambda: path.write_text("x")) == {world.inode(path)}
    assert (world.inode(path), True) in world.leases.told


def test_attributes(world: World) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    world.leases.told.clear()
    assert world.bumped(lambda: path.chmod(0o600)) == {world.inode(path)}
    assert world.leases.told == [(world.inode(path), False)]
    assert world.bumped(lambda: world.directory.chmod(0o700)) == {world.inode(world.directory)}


def test_a_removed_file_that_a_guest_has_open(world: World) -> None:
    """inotify does not know which inode a removed name stood for."""
    path = world.directory / "f"
    path.touch()
    slots = {world.name(path), world.inode(world.directory), world.inode(path)}
    fd = os.open(path, os.O_PATH)
    assert world.bumped(path.unlink) == slots
    assert world.bumped(lambda: os.truncate(f"/proc/self/fd/{fd}", 5)) == slots - {
        world.inode(world.directory),
        world.table.name_slot(world.inode(world.directory), b"f"),
    }
    os.close(fd)


def test_rename_over_a_file_that_a_guest_has_open(world: World) -> None:
    path, new = world.directory / "f", world.directory / "g"
    path.touch()
    new.touch()
    fd = os.open(path, os.O_PATH)
    victim = world.inode(path)
    assert world.bumped(lambda: new.rename(path)) == {
        *(world.name(path), world.name(new), world.inode(world.directory), world.inode(path), victim)
    }
    assert world.seen[-2:] == [
        ("host", "move from", os.fsencode(new)),
        ("host", "move to", os.fsencode(path)),
    ]
    os.close(fd)


def test_a_directory_that_nobody_asked_for_and_a_file_with_two_links(world: World) -> None:
    below = world.directory / "below"
    below.mkdir()
    path, other = world.directory / "f", below / "g"
    path.touch()
    os.link(path, other)
    world.settle()
    world.seen.clear()
    assert world.bumped(lambda: other.write_text("x")) == {world.inode(path)}
    assert world.seen == []


def test_changes_of_a_backend_are_known_by_its_process(world: World) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    code = "import os, sys; print(os.getpid(), flush=True); input(); os.truncate(sys.argv[1], 7)"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as backend:
        assert backend.stdout is not None
        world.watch.join(2, 6, "blue", Path("/nowhere"), pid=int(backend.stdout.readline()))
        assert world.bumped(lambda: backend.communicate("\n")) == set()
    assert world.domain.counts.own == 1
    assert world.seen[-1] == ("blue", "modify", os.fsencode(path))
    world.watch.leave(2)
    assert world.bumped(lambda: os.truncate(path, 8)) == {world.inode(path)}


def cannot_open(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let handles be opened only after these errors."""
    errors, real = iter(numbers), fanotify_calls.open_handle

    def open_handle(mount: int, handle: fanotify_calls.Handle) -> int:
        if number := next(errors, 0):
            raise OSError(number, os.strerror(number))
        return real(mount, handle)

    monkeypatch.setattr(fanotify_calls, "open_handle", open_handle)


@pytest.mark.parametrize("numbers", [[errno.ENOMEM, errno.ENOMEM], [errno.ENOMEM, errno.ESTALE]])
def test_an_inode_number_that_is_being_used_again(
    world: World, monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    """What ext4 calls ENOMEM then raises no floor."""
    floor, path = world.table.floor, world.directory / "f"
    monkeypatch.setattr(fanotify, "REUSED_SECONDS", 60)
    cannot_open(monkeypatch, *numbers)
    bumped = world.bumped(path.touch)
    assert errno.ESTALE in numbers or bumped >= {world.name(path), world.inode(path)}
    assert world.table.floor == floor


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_what_cannot_be_looked_up_invalidates_everything(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], number: int
) -> None:
    expect_log("cannot be looked up")
    floor = world.table.floor
    cannot_open(monkeypatch, *itertools.repeat(number, 1000))
    monkeypatch.setattr(fanotify, "REUSED_SECONDS", 0.01)
    (world.directory / "f").touch()
    world.settle()
    assert world.table.floor > floor


def test_overflow(world: World) -> None:
    floor = world.table.floor
    for number in range(int(QUEUE.read_text()) + 500):
        (world.directory / f"{number}").touch()
    world.settle()
    assert world.domain.counts.overflows == 1
    assert world.table.floor > floor


def test_a_file_system_that_cannot_be_watched_so(world: World, expect_log: Callable[[str], None]) -> None:
    expect_log("inotify watches its directories")
    # Its files have no handles.
    assert world.ask(Path("/proc/sys"))
    assert world.ask(Path("/proc/sys/fs"))
    assert world.watch.watches == 3


def test_a_file_system_is_let_go_with_the_last_that_asked(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
    world.watch.join(2, 6, "blue", Path("/nowhere"), pid=(1 << 30) + 1)
    assert world.ask(other, key=2)
    assert world.watch.watches == 2
    world.watch.leave(2)
    assert world.watch.watches == 1
    (other / "f").touch()
    events = world.domain.counts.events
    world.settle()
    assert world.domain.counts.events == events
    subprocess.run(["umount", other], check=True)


def test_on_a_disk(world: World, tmp_path: Path) -> None:
    """Where others change things, too: at least ours are bumped."""
    assert world.ask(tmp_path)
    path = tmp_path / "f"
    assert world.bumped(path.touch) >= {world.name(path), world.inode(tmp_path), world.inode(path)}
    victim = world.inode(path)
    assert victim in world.bumped(path.unlink)


@pytest.mark.parametrize("capability", [CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH])
def test_not_permitted_is_one_line_with_a_remedy(world: World, capability: int) -> None:
    pid = os.fork()
    if pid == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        libc.capget(header, data)
        data[0] &= ~(1 << capability)
        libc.capset(header, data)
        try:
            FanotifyWatch(world.domain)
        except UserError as error:
            os._exit("use --watch inotify" in str(error) and "CAP_" in str(error))
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
