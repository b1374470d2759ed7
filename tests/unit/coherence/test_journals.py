"""Journals and the semaphores of the backends that have them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sysv_ipc  # type: ignore[import-not-found]

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon import journals
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import JOURNAL_BYTES, Journal, Table
from tests.unit.coherence.other_kinds import OTHER_KINDS, remove


@pytest.fixture
def key(paths: DomainPaths, table: Table) -> int:
    return journals.create(paths, table.domain, os.getuid(), 3)


def announced(path: Path) -> tuple[int, ...] | None:
    journal = journals.read(path)
    assert journal is not None
    return journal.announced


@pytest.fixture
def journal(paths: DomainPaths, key: int) -> Iterator[Journal]:
    fd = journals.open_fd(paths, key)
    journal = Journal.from_fd(fd)
    os.close(fd)
    yield journal
    journal.close()


def test_what_is_announced_is_read_until_it_is_cleared(
    paths: DomainPaths, table: Table, key: int, journal: Journal
) -> None:
    path = paths.journal(key)
    assert journals.read(path) == (table.domain, 3, 0, ())
    journal.announce([5, 1 << 63, 7])
    assert announced(path) == journal.entries == (5, 1 << 63, 7)
    journal.announce(range(15))
    assert announced(path) == tuple(range(15))
    journal.clear()
    assert not journal.entries
    assert journals.read(path) == (table.domain, 3, 0, ())


def test_more_than_fits_is_read_as_anything(paths: DomainPaths, table: Table, key: int, journal: Journal) -> None:
    journal.announce(range(16))
    assert journals.read(paths.journal(key)) == (table.domain, 3, 0, None)


@pytest.mark.parametrize("size", [0, 127, 136, JOURNAL_BYTES - 1])
def test_a_journal_that_was_cut_off_is_read_as_anything(paths: DomainPaths, table: Table, key: int, size: int) -> None:
    os.truncate(paths.journal(key), size)
    assert journals.read(paths.journal(key)) is None


def test_a_journal_that_was_removed_is_read_as_anything(paths: DomainPaths, table: Table, key: int) -> None:
    journals.remove(paths, key)
    assert journals.read(paths.journal(key)) is None
    assert liveness.owner(key) is None
    with pytest.raises(UserError, match="restart the backend"):
        journals.open_fd(paths, key)


def test_another_file_is_not_mapped_as_a_journal(paths: DomainPaths, table: Table) -> None:
    fd = os.open(paths.table, os.O_RDWR)
    try:
        with pytest.raises(UserError, match="not one of this version"):
            Journal.from_fd(fd)
    finally:
        os.close(fd)


def test_a_move_takes_along_what_is_announced(paths: DomainPaths, table: Table, journal: Journal) -> None:
    other = journals.create(paths, table.domain, os.getuid(), 3)
    journal.announce([5, 6])
    fd = journals.open_fd(paths, other)
    journal.move(fd)
    os.close(fd)
    assert announced(paths.journal(other)) == (5, 6)
    journal.announce([8])
    assert announced(paths.journal(other)) == (8,)


def test_a_closed_journal_says_so(journal: Journal) -> None:
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.announce([1])
    journal.close()


def test_no_shared_memory_is_told_and_leaves_nothing(
    paths: DomainPaths, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"):
        journals.create(paths, table.domain, 0, 3)
    assert paths.journal_keys() == []


def test_no_semaphore_left_is_told_and_leaves_nothing(
    paths: DomainPaths, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sysv_ipc, "Semaphore", none_left)
    with pytest.raises(UserError, match=r"no SysV semaphore.*kernel\.sem"):
        journals.create(paths, table.domain, 0, 3)
    assert paths.journal_keys() == []


def test_the_holder_is_known_while_it_lives_and_not_after_kill_9(key: int) -> None:
    assert liveness.owner(key) is None
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        liveness.take(key)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    assert liveness.owner(key) == pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert liveness.owner(key) is None
    os.close(read)
    os.close(write)


def test_a_fork_of_the_holder_does_not_hold(key: int) -> None:
    read, write = os.pipe()
    taker = os.fork()
    if taker == 0:
        liveness.take(key)
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(write, str(child).encode())
        os._exit(0)
    os.waitpid(taker, 0)
    child = int(os.read(read, 20))
    assert liveness.owner(key) is None
    os.kill(child, signal.SIGKILL)
    os.close(read)
    os.close(write)


def test_a_semaphore_taken_without_undo_is_not_held_by_the_dead(key: int) -> None:
    taker = os.fork()
    if taker == 0:
        semaphore = sysv_ipc.Semaphore(key)
        semaphore.block = False
        semaphore.acquire()
        os._exit(0)
    os.waitpid(taker, 0)
    assert sysv_ipc.Semaphore(key).value == 0
    assert liveness.owner(key) is None


def test_a_semaphore_is_held_once_and_let_go(key: int) -> None:
    liveness.take(key)
    assert liveness.owner(key) == os.getpid()
    with pytest.raises(UserError, match="cannot be taken"):
        liveness.take(key)
    liveness.let_go(key)
    assert liveness.owner(key) is None


def test_a_semaphore_that_is_not_there(key: int) -> None:
    liveness.remove(key)
    liveness.remove(key)
    liveness.let_go(key)
    with pytest.raises(UserError, match="IPC namespace"):
        liveness.take(key)


def test_files_of_other_kinds_are_no_journals(paths: DomainPaths, key: int) -> None:
    stranger = paths.journal(1)
    stranger.symlink_to("/dev/zero")
    odd = paths.journal(2).with_suffix(".xyz")
    odd.touch()
    try:
        assert paths.journal_keys() == [key]
    finally:
        stranger.unlink()
        odd.unlink()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", OTHER_KINDS)
def test_what_is_no_regular_file_is_no_journal(paths: DomainPaths, make: Callable[[Path], None]) -> None:
    path = paths.journal(1)
    make(path)
    try:
        assert journals.read(path) is None
        with pytest.raises(UserError, match="not a regular file"):
            journals.open_fd(paths, 1)
    finally:
        remove(path)
