"""A guest that knows more inodes than the server may have open."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    ENTRY_OUT,
    FORGET_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RENAME2_IN,
    Opcode,
)
from tests.unit.server.leased import lease_domain
from tests.unit.server.raw_guest import RawGuest, raw_guest

FILES = 300
OPEN = 40
OVERDRAWN = 64
"""Beyond that, for deleted files."""


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


def delete_behind(guest: RawGuest, share: Path, first: int) -> list[int]:
    """The host deletes each file right after the guest has looked it up."""
    nodeids = []
    for i in range(first, FILES):
        nodeids.append(lookup(guest, f"f{i}"))
        (share / f"f{i}").unlink()
    return nodeids


def test_what_others_deleted_leaves_room_for_what_is_new(
    guest: RawGuest, share: Path, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("raise --rlimit-nofile")
    nodeids = delete_behind(guest, share, 0)
    assert guest.device.fs.inodes.open <= OPEN + OVERDRAWN + 1
    assert content(guest, lookup(guest, "inner", lookup(guest, "d"))) == b"inner"
    errors = [guest.request(Opcode.GETATTR, nodeid, bytes(16))[0] for nodeid in nodeids]
    assert set(errors) == {0, errno.ESTALE}
    assert errors[-1] == 0
    assert OPEN // 2 <= errors.count(0) <= OPEN + OVERDRAWN + 1
    for nodeid in nodeids:
        guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))
    assert caplog.text.count("raise --rlimit-nofile") == 1


def test_what_is_open_is_not_given_up(guest: RawGuest, share: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("raise --rlimit-nofile")
    nodeid = lookup(guest, "f0")
    error, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    (share / "f0").unlink()
    old = delete_behind(guest, share, 1)[0]
    assert guest.request(Opcode.GETATTR, old, bytes(16))[0] == errno.ESTALE
    assert guest.request(Opcode.GETATTR, nodeid, bytes(16))[0] == 0
    assert guest.request(Opcode.READ, nodeid, READ_IN.pack(OPEN_OUT.unpack(reply)[0], 0, 100, 0, 0, 0)) == (0, b"0")


@pytest.fixture
def silent(share: Path) -> Iterator[RawGuest]:
    """A guest in shared, which opens nothing."""
    with lease_domain(share).guest(opens=False) as guest:
        guest.device.fs.inodes.max_open = OPEN
        yield guest


def test_what_the_guest_deleted_itself_is_not_given_up(
    silent: RawGuest, share: Path, expect_log: Callable[[str], None]
) -> None:
    """Nor what never had a name: whatever it does not forget, it uses."""
    expect_log("raise --rlimit-nofile")
    deleted = lookup(silent, "f0")
    assert silent.request(Opcode.UNLINK, 1, b"f0\0")[0] == 0
    body = CREATE_IN.pack(os.O_RDWR | os.O_TMPFILE, stat.S_IFREG | 0o640, 0, 0) + b"/\0"
    error, reply = silent.request(Opcode.TMPFILE, 1, body)
    assert error == 0
    nameless = int(ENTRY_OUT.unpack_from(reply)[0])
    silent.start_hiprio()  # it closes what was not used for a second or two
    silent.wait(lambda: silent.device.fs.handles.live == 0)
    old = delete_behind(silent, share, 1)[0]
    assert silent.request(Opcode.GETATTR, old, bytes(16))[0] == errno.ESTALE
    assert silent.request(Opcode.GETATTR, deleted, bytes(16))[0] == 0
    assert silent.request(Opcode.GETATTR, nameless, bytes(16))[0] == 0


def test_what_the_guest_renamed_and_others_deleted_is_given_up(
    silent: RawGuest, share: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("raise --rlimit-nofile")
    for i in range(FILES):
        lookup(silent, f"f{i}")
        assert silent.request(Opcode.RENAME2, 1, RENAME2_IN.pack(1, 0) + b"f%d\0g%d\0" % (i, i))[0] == 0
        (share / f"g{i}").unlink()
    assert silent.device.fs.inodes.open <= OPEN + OVERDRAWN + 1


def test_many_that_were_used_are_no_obstacle(guest: RawGuest) -> None:
    """However many are looked at for one to close, there is one."""
    guest.device.fs.inodes.max_open = FILES - 10
    for i in range(FILES):
        assert guest.request(Opcode.GETATTR, lookup(guest, f"f{i}"), bytes(16))[0] == 0
        assert guest.device.fs.inodes.open <= FILES - 10 + 1


def test_files_that_are_used_without_being_opened_take_half(share: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with lease_domain(share).guest(opens=False) as guest:
            assert guest.device.fs.inodes.max_open == 512
            for i in range(FILES):
                read = READ_IN.pack(0, 0, 100, 0, 0, os.O_RDONLY)
                assert guest.request(Opcode.READ, lookup(guest, f"f{i}"), read) == (0, str(i).encode())
                assert guest.device.fs.handles.live <= 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


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
