"""A guest that opens no files (FUSE_NO_OPEN_SUPPORT): what it does with fh 0, and the descriptors for it."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coherent_vfs.server.fuse.protocol import (
    COPY_FILE_RANGE_IN,
    CREATE_IN,
    ENTRY_OUT_SIZE,
    FALLOCATE_IN,
    FLUSH_IN,
    FORGET_IN,
    FSYNC_IN,
    LSEEK_IN,
    LSEEK_OUT,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    WRITE_OUT,
    FattrFlag,
    Opcode,
    WriteFlag,
)
from tests.unit.server.leased import LeaseDomain, find, set_attributes, write_body
from tests.unit.server.raw_guest import RawGuest, raw_guest
from tests.unit.server.share import entry

ROOM = 1024
"""Descriptors that one such guest has at most (server.passthrough.implicit_handles)."""


@pytest.fixture
def guest(domain: LeaseDomain) -> Iterator[RawGuest]:
    """A guest that offered to open nothing."""
    with domain.guest(opens=False) as guest:
        yield guest


def read(guest: RawGuest, nodeid: int, size: int = 100, offset: int = 0) -> tuple[int, bytes]:
    return guest.request(Opcode.READ, nodeid, READ_IN.pack(0, offset, size, 0, 0, os.O_RDONLY))


def write(guest: RawGuest, nodeid: int, data: bytes, offset: int = 0, **flags: int) -> int:
    error, reply = guest.request(Opcode.WRITE, nodeid, write_body(data, offset, **flags))
    assert error == 0
    return int(WRITE_OUT.unpack(reply)[0])


def descriptors(guest: RawGuest) -> int:
    """How many files are open for a guest that has no directory open."""
    return guest.device.fs.handles.live


def test_open_and_flush_are_not_needed(guest: RawGuest) -> None:
    nodeid = find(guest, "d/f")
    assert guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDWR, 0)) == (errno.ENOSYS, b"")
    assert guest.request(Opcode.FLUSH, nodeid, FLUSH_IN.pack(0, 0)) == (errno.ENOSYS, b"")
    # Directories are opened all the same.
    error, reply = guest.request(Opcode.OPENDIR, find(guest, "d"), OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    fh, _, _ = OPEN_OUT.unpack(reply)
    assert fh != 0
    assert guest.request(Opcode.RELEASEDIR, find(guest, "d"), RELEASE_IN.pack(fh, 0, 0, 0))[0] == 0


@pytest.mark.parametrize("cache", ["none", "auto", "always", "shared"])
def test_only_in_shared_and_only_where_the_guest_can(domain: LeaseDomain, cache: str) -> None:
    for opens in (True, False):
        with domain.guest(cache=cache, opens=opens) as guest:
            nodeid = find(guest, "d/f")
            error, _ = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
            assert error == (errno.ENOSYS if cache == "shared" and not opens else 0)
            assert read(guest, nodeid)[0] == (0 if error else errno.EBADF)


def test_a_new_session_begins_anew(guest: RawGuest) -> None:
    nodeid = find(guest, "d/f")
    assert read(guest, nodeid) == (0, b"content")
    guest.initialize()
    assert descriptors(guest) == 0
    nodeid = find(guest, "d/f")
    assert read(guest, nodeid) == (errno.EBADF, b"")
    assert guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))[0] == 0


def test_data(guest: RawGuest, domain: LeaseDomain) -> None:
    path = domain.share / "d/f"
    nodeid = find(guest, "d/f")
    assert read(guest, nodeid, 4, 3) == (0, b"tent")
    assert write(guest, nodeid, b"CON") == 3
    assert path.read_bytes() == b"CONtent"
    assert read(guest, nodeid) == (0, b"CONtent")
    for flags in (0, 1):
        assert guest.request(Opcode.FSYNC, nodeid, FSYNC_IN.pack(0, flags)) == (0, b"")
    assert guest.request(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(0, 0, 1 << 20, 0)) == (0, b"")
    assert path.stat().st_size == 1 << 20
    error, reply = guest.request(Opcode.LSEEK, nodeid, LSEEK_IN.pack(0, 0, os.SEEK_DATA))
    assert (error, LSEEK_OUT.unpack(reply)) == (0, (0,))
    body = set_attributes(FattrFlag.SIZE | FattrFlag.FH, fh=0, size=5)
    assert guest.request(Opcode.SETATTR, nodeid, body)[0] == 0
    assert path.read_bytes() == b"CONte"
    target = find(guest, "d/g")
    error, reply = guest.request(Opcode.COPY_FILE_RANGE, nodeid, COPY_FILE_RANGE_IN.pack(0, 0, target, 0, 2, 5, 0))
    assert (error, WRITE_OUT.unpack(reply)) == (0, (5,))
    assert (domain.share / "d/g").read_bytes() == b"coCONte"
    # A descriptor for reading, or one for both: never two.
    assert descriptors(guest) == 2


def test_the_flags_of_the_open_file_come_with_each_write(guest: RawGuest, domain: LeaseDomain) -> None:
    path = domain.share / "d/f"
    nodeid = find(guest, "d/f")
    assert write(guest, nodeid, b"!", 0, flags=os.O_WRONLY | os.O_APPEND) == 1
    assert path.read_bytes() == b"content!"
    assert write(guest, nodeid, b"C", 0, flags=os.O_WRONLY) == 1
    assert path.read_bytes() == b"Content!"
    # Pages of a mapping have their place, whichever file the guest's kernel sends them with.
    assert write(guest, nodeid, b"O", 1, flags=os.O_RDWR | os.O_APPEND, write_flags=WriteFlag.CACHE) == 1
    assert path.read_bytes() == b"COntent!"
    for flag in (os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_APPEND):
        write(guest, nodeid, b"?", 8, flags=os.O_WRONLY | flag)
    assert path.read_bytes() == b"COntent!??"


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_RDWR | os.O_APPEND])
def test_a_file_that_was_created_is_used_like_any_other(guest: RawGuest, domain: LeaseDomain, flags: int) -> None:
    """Such a guest does not RELEASE what it got by CREATE."""
    error, reply = guest.request(
        Opcode.CREATE, find(guest, "d"), CREATE_IN.pack(flags, stat.S_IFREG | 0o600, 0, 0) + b"new\0"
    )
    assert error == 0
    assert OPEN_OUT.unpack_from(reply, ENTRY_OUT_SIZE)[0] == 0
    nodeid = entry(reply)[0].nodeid
    write(guest, nodeid, b"data")
    write(guest, nodeid, b"D")
    assert read(guest, nodeid) == (0, b"Data")
    assert guest.request(Opcode.RELEASE, nodeid, RELEASE_IN.pack(0, 0, 0, 0))[0] == 0
    assert read(guest, nodeid) == (0, b"Data")
    assert descriptors(guest) == 1


MODE_BITS_DO_NOT_COUNT = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextmanager
def like_an_ordinary_user() -> Iterator[None]:
    """A block in which this thread may do with its own files what their modes say, as who is not root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    within = (ctypes.c_uint32 * 6)(*before)
    within[0] &= ~MODE_BITS_DO_NOT_COUNT
    assert libc.capset(header, within) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.parametrize("mode", [0, 0o444, 0o200, 0o400])
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_RDWR | os.O_APPEND])
def test_what_create_opened_is_used_whatever_the_mode(guest: RawGuest, mode: int, flags: int) -> None:
    """The guest's kernel has checked permission, and its program has the file open for as long as it likes."""
    guest.start_hiprio()
    parent, other = find(guest, "d"), find(guest, "e/h")
    with like_an_ordinary_user():
        body = CREATE_IN.pack(flags, stat.S_IFREG | mode, 0, 0) + b"new\0"
        error, reply = guest.request(Opcode.CREATE, parent, body)
        assert error == 0
        nodeid = entry(reply)[0].nodeid
        assert read(guest, nodeid) == (0, b"")
        assert write(guest, nodeid, b"hello", flags=flags) == 5
        # Long enough for every other descriptor to be closed twice.
        for _ in range(2):
            assert read(guest, other)[0] == 0
            guest.wait(lambda: descriptors(guest) == 1)
        assert write(guest, nodeid, b"H") == 1
        assert read(guest, nodeid) == (0, b"Hello")
        assert guest.request(Opcode.UNLINK, parent, b"new\0")[0] == 0
        assert read(guest, nodeid) == (0, b"Hello")
        assert guest.request(Opcode.FSYNC, nodeid, FSYNC_IN.pack(0, 0)) == (0, b"")
        # Once the guest has closed it, it forgets it.
        guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))
        guest.wait(lambda: descriptors(guest) == 0)


def test_a_program_that_was_created_can_be_run_soon(guest: RawGuest) -> None:
    """Though it could not be opened for writing again."""
    guest.start_hiprio()
    with like_an_ordinary_user():
        body = CREATE_IN.pack(os.O_WRONLY, stat.S_IFREG | 0o555, 0, 0) + b"new\0"
        error, reply = guest.request(Opcode.CREATE, find(guest, "d"), body)
        assert error == 0
        assert write(guest, entry(reply)[0].nodeid, b"#!/bin/true") == 11
        guest.wait(lambda: descriptors(guest) == 0)


def test_a_write_clears_what_it_must(guest: RawGuest, domain: LeaseDomain) -> None:
    path = domain.share / "d/f"
    nodeid = find(guest, "d/f")
    path.chmod(0o6755)
    write(guest, nodeid, b"x", write_flags=WriteFlag.KILL_SUIDGID)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["fifo", "d", "link", "device"])
def test_only_regular_files_are_opened_that_way(guest: RawGuest, domain: LeaseDomain, name: str) -> None:
    if name == "device":
        os.mknod(domain.share / "device", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    nodeid = find(guest, name)
    before = descriptors(guest)
    for opcode, body in (
        (Opcode.READ, READ_IN.pack(0, 0, 100, 0, 0, 0)),
        (Opcode.WRITE, write_body(b"x")),
        (Opcode.FSYNC, FSYNC_IN.pack(0, 0)),
        (Opcode.FALLOCATE, FALLOCATE_IN.pack(0, 0, 10, 0)),
        (Opcode.LSEEK, LSEEK_IN.pack(0, 0, os.SEEK_DATA)),
        (Opcode.SETATTR, set_attributes(FattrFlag.SIZE | FattrFlag.FH, size=3)),
        (Opcode.COPY_FILE_RANGE, COPY_FILE_RANGE_IN.pack(0, 0, nodeid, 0, 2, 5, 0)),
    ):
        assert guest.request(opcode, nodeid, body)[0] in (errno.EINVAL, errno.EISDIR), opcode
    assert descriptors(guest) == before


def test_handles_that_nobody_was_given_are_refused(guest: RawGuest) -> None:
    nodeid = find(guest, "d/f")
    assert read(guest, nodeid)[0] == 0
    for fh in (4711, 1 << 63, (1 << 64) - 1):
        assert guest.request(Opcode.READ, nodeid, READ_IN.pack(fh, 0, 100, 0, 0, 0))[0] == errno.EBADF
    assert guest.request(Opcode.READ, 0xDEAD, READ_IN.pack(0, 0, 100, 0, 0, 0))[0] == errno.ESTALE


def test_a_share_that_is_read_only(domain: LeaseDomain) -> None:
    with domain.guest(opens=False, readonly=True) as guest:
        nodeid = find(guest, "d/f")
        assert read(guest, nodeid) == (0, b"content")
        assert guest.request(Opcode.WRITE, nodeid, write_body(b"x"))[0] == errno.EROFS


def test_a_program_that_was_written_can_be_run_soon(guest: RawGuest, domain: LeaseDomain) -> None:
    """On the host, a file that is open for writing cannot be executed."""
    guest.start_hiprio()
    nodeid = find(guest, "d/f")
    write(guest, nodeid, b"x")
    assert descriptors(guest) == 1
    used = find(guest, "d/g")
    assert read(guest, used)[0] == 0

    def only_what_is_in_use() -> bool:
        there = descriptors(guest)
        assert there
        assert read(guest, used)[0] == 0
        return there == 1

    guest.wait(only_what_is_in_use)
    guest.wait(lambda: descriptors(guest) == 0)
    assert read(guest, nodeid) == (0, b"xontent")


def test_a_file_without_a_name_can_be_read_on_and_its_descriptor_goes(guest: RawGuest, domain: LeaseDomain) -> None:
    nodeid, parent = find(guest, "d/f"), find(guest, "d")
    write(guest, nodeid, b"X")
    assert descriptors(guest) == 1
    assert guest.request(Opcode.UNLINK, parent, b"f\0")[0] == 0
    assert descriptors(guest) == 0
    assert read(guest, nodeid) == (0, b"Xontent")


def test_there_are_no_more_descriptors_than_allowed(guest: RawGuest) -> None:
    path = guest.device.fs.settings.shared_dir / "e"
    for number in range(ROOM + 20):
        (path / str(number)).write_bytes(b"%d" % number)
    nodeids = [find(guest, f"e/{number}") for number in range(ROOM + 20)]
    for number, nodeid in enumerate(nodeids):
        assert read(guest, nodeid) == (0, b"%d" % number)
    assert descriptors(guest) == ROOM
    for number, nodeid in enumerate(nodeids):
        assert read(guest, nodeid) == (0, b"%d" % number)
    assert descriptors(guest) == ROOM
    guest.device.reset()
    assert descriptors(guest) == 0


def test_without_a_domain_files_are_opened(domain: LeaseDomain) -> None:
    with raw_guest(domain.share, opens=False) as guest:
        assert guest.request(Opcode.OPEN, find(guest, "d/f"), OPEN_IN.pack(os.O_RDONLY, 0))[0] == 0
