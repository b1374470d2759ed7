"""A guest that knows more inodes than the server may have open."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.fuse.protocol import ENTRY_OUT, FORGET_IN, OPEN_IN, OPEN_OUT, READ_IN, Opcode
from tests.unit.server.raw_guest import RawGuest, raw_guest

FILES = 300
OPEN = 40


@pytest.fixture
def share() -> Iterator[Path]:
    """On a file system that has file handles."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    for i in range(FILES):
        (directory / f"f{i}").write_text(str(i))
    (directory / "d").mkdir()
    (directory / "d/inner").write_text("inner")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def guest(share: Path) -> Iterator[RawGuest]:
    with raw_guest(share) as guest:
        guest.device.fs.inodes.max_open = OPEN
        yield guest


def lookup(guest: RawGuest, name: str, parent: int = 1) -> int:
    error, reply = guest.request(Opcode.LOOKUP, parent, name.encode() + b"\0")
    assert error == 0
    return int(ENTRY_OUT.unpack_from(reply)[0])


def content(guest: RawGuest, nodeid: int) -> bytes:
    error, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0, os.strerror(error)
    fh = OPEN_OUT.unpack(reply)[0]
    error, data = guest.request(Opcode.READ, nodeid, READ_IN.pack(fh, 0, 100, 0, 0, 0))
    assert error == 0
    return data


def test_all_stay_usable(guest: RawGuest) -> None:
    inodes = guest.device.fs.inodes
    nodeids = [lookup(guest, f"f{i}") for i in range(FILES)]
    assert inodes.live == FILES
    assert inodes.open <= OPEN + 1
    assert [content(guest, nodeid) for nodeid in nodeids] == [str(i).encode() for i in range(FILES)]
    assert [lookup(guest, f"f{i}") for i in range(FILES)] == nodeids
    for nodeid in nodeids:
        guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(2))
    assert inodes.live == 0
    assert inodes.open == inodes.idle


def test_a_closed_directory_and_what_is_in_it(guest: RawGuest) -> None:
    directory = lookup(guest, "d")
    for i in range(FILES):
        lookup(guest, f"f{i}")
    assert content(guest, lookup(guest, "inner", directory)) == b"inner"


def test_a_number_that_has_a_new_owner(guest: RawGuest, share: Path) -> None:
    """The closed inode does not hold its number: ext4 gives it to the next file."""
    old = lookup(guest, "f0")
    for i in range(1, FILES):
        lookup(guest, f"f{i}")
    for _ in range(50):
        number = (share / "f0").stat().st_ino
        (share / "f0").unlink()
        (share / "f0").write_text("new")
        if (share / "f0").stat().st_ino == number:
            break
    else:
        pytest.fail("the file system did not use the inode number again")
    new = lookup(guest, "f0")
    assert new != old
    assert content(guest, new) == b"new"
    assert guest.request(Opcode.GETATTR, old, bytes(16))[0] == errno.ESTALE
    guest.tell(Opcode.FORGET, old, FORGET_IN.pack(1))
    assert lookup(guest, "f0") == new


def test_gone_from_the_host(guest: RawGuest, share: Path) -> None:
    old = lookup(guest, "f0")
    for i in range(1, FILES):
        lookup(guest, f"f{i}")
    (share / "f0").unlink()
    assert guest.request(Opcode.GETATTR, old, bytes(16))[0] == errno.ESTALE


def test_the_directory_of_a_listing_stays_open(guest: RawGuest) -> None:
    guest.device.fs.inodes.max_open = 4
    error, reply = guest.request(Opcode.OPENDIR, 1, OPEN_IN.pack(0, 0))
    fh = OPEN_OUT.unpack(reply)[0]
    seen = 0
    offset = 0
    while True:
        error, reply = guest.request(Opcode.READDIRPLUS, 1, READ_IN.pack(fh, offset, 8192, 0, 0, 0), room=8192)
        assert error == 0
        if not reply:
            break
        at = 0
        while at < len(reply):
            head = at + 128
            offset = int.from_bytes(reply[head + 8 : head + 16], "little")
            length = int.from_bytes(reply[head + 16 : head + 20], "little")
            seen += ENTRY_OUT.unpack_from(reply, at)[0] != 0
            at = head + (24 + length + 7) // 8 * 8
    assert seen == FILES + 1


def test_open_files_take_descriptors_from_inodes(guest: RawGuest) -> None:
    inodes, nodeids = guest.device.fs.inodes, [lookup(guest, f"f{i}") for i in range(OPEN)]
    handles = OPEN // 2
    for nodeid in nodeids[:handles]:
        error, _ = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
        assert error == 0
    assert inodes.open <= OPEN - handles + 1
    assert [content(guest, nodeid) for nodeid in nodeids] == [str(i).encode() for i in range(OPEN)]


def test_what_is_known_is_found_without_a_free_descriptor(guest: RawGuest) -> None:
    """Also right after new files, when the next one is expected to be new, too."""
    *_, last = [lookup(guest, f"f{i}") for i in range(5)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # However many are free: no new one may be as low as that.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        found = lookup(guest, "f4")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == last
