"""LOOKUP of "." and "..": what a guest has a file handle of, also when it has forgotten it (FUSE_EXPORT_SUPPORT)."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.server.fuse.protocol import ENTRY_OUT, FORGET_IN, GETATTR_IN, ROOT_ID, EntryOut, Opcode
from tests.unit.server.raw_guest import RawGuest, raw_guest

OTHERS = ("x", "y", "z")


@pytest.fixture
def share() -> Iterator[Path]:
    """On a file system that has file handles."""
    share = Path(tempfile.mkdtemp(dir="/var/tmp")) / "share"
    (share / "d/e").mkdir(parents=True)
    (share / "d/e/f").write_text("content")
    for name in OTHERS:
        (share / name).touch()
    yield share
    shutil.rmtree(share.parent)


@pytest.fixture
def guest(share: Path) -> Iterator[RawGuest]:
    with raw_guest(share) as guest:
        yield guest


def ask(guest: RawGuest, nodeid: int, name: str) -> EntryOut | int:
    """LOOKUP: the entry, or an errno."""
    error, reply = guest.request(Opcode.LOOKUP, nodeid, name.encode() + b"\0")
    return error or EntryOut._make(ENTRY_OUT.unpack_from(reply))


def look_up(guest: RawGuest, nodeid: int, name: str) -> EntryOut:
    """The same, of what is there."""
    found = ask(guest, nodeid, name)
    assert isinstance(found, EntryOut), os.strerror(found)
    return found


def find(guest: RawGuest, path: str) -> EntryOut:
    """The entry of a path; what is on the way is forgotten."""
    entry = look_up(guest, ROOT_ID, ".")
    for part in Path(path).parts:
        parent, entry = entry, look_up(guest, entry.nodeid, part)
        forget(guest, parent.nodeid)
    return entry


def forget(guest: RawGuest, nodeid: int) -> None:
    """Take one lookup back."""
    guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))


@pytest.fixture
def forgotten(guest: RawGuest) -> list[EntryOut]:
    """d, e and f, which the guest has forgotten and the device has closed."""
    entries = [find(guest, path) for path in ("d", "d/e", "d/e/f")]
    for entry in entries:
        forget(guest, entry.nodeid)
    # Each one that is opened more makes it too many.
    guest.device.fs.inodes.max_open = 0
    others = [look_up(guest, ROOT_ID, name) for name in OTHERS]
    guest.device.fs.inodes.max_open = 1000
    for other in others:
        forget(guest, other.nodeid)
    return entries


def test_what_was_forgotten_is_the_same_when_it_is_found(guest: RawGuest, forgotten: list[EntryOut]) -> None:
    inodes = guest.device.fs.inodes
    assert (inodes.live, inodes.remembered) == (0, 3)
    for entry in forgotten:
        assert guest.request(Opcode.GETATTR, entry.nodeid, GETATTR_IN.pack(0, 0))[0] == errno.ESTALE
        assert look_up(guest, entry.nodeid, ".") == entry
        assert guest.request(Opcode.GETATTR, entry.nodeid, GETATTR_IN.pack(0, 0))[0] == 0
    assert (inodes.live, inodes.remembered) == (3, 0)
    # By its name it is the same one, whether it was found by a handle before or not.
    assert [find(guest, path).nodeid for path in ("d", "d/e", "d/e/f")] == [entry.nodeid for entry in forgotten]


def test_what_was_forgotten_is_the_same_by_its_name(guest: RawGuest, forgotten: list[EntryOut]) -> None:
    assert [find(guest, path).nodeid for path in ("d", "d/e", "d/e/f")] == [entry.nodeid for entry in forgotten]
    assert guest.device.fs.inodes.remembered == 0


def test_parents(guest: RawGuest, forgotten: list[EntryOut]) -> None:
    d, e, f = forgotten
    assert ask(guest, e.nodeid, "..") == errno.ESTALE
    look_up(guest, e.nodeid, ".")
    assert look_up(guest, e.nodeid, "..").nodeid == d.nodeid
    root = look_up(guest, d.nodeid, "..")
    # The guest's kernel made the root by itself, with generation 0.
    assert (root.nodeid, root.generation) == (ROOT_ID, 0)
    assert look_up(guest, ROOT_ID, "..").nodeid == ROOT_ID
    look_up(guest, f.nodeid, ".")
    assert ask(guest, f.nodeid, "..") == errno.ENOTDIR


def test_what_is_deleted_is_not_found(guest: RawGuest, share: Path, forgotten: list[EntryOut]) -> None:
    shutil.rmtree(share / "d")
    assert [ask(guest, entry.nodeid, ".") for entry in forgotten[1:]] == [errno.ESTALE] * 2
    # Not either what has its number now.
    (share / "d/e").mkdir(parents=True)
    (share / "d/e/f").write_text("new")
    new = [find(guest, path).nodeid for path in ("d", "d/e", "d/e/f")]
    assert not {entry.nodeid for entry in forgotten} & set(new)


def test_what_the_host_moves_out_of_the_share_is_not_found(
    guest: RawGuest, share: Path, forgotten: list[EntryOut]
) -> None:
    _, e, _ = forgotten
    (share / "d").rename(share.parent / "outside")
    assert ask(guest, e.nodeid, ".") == errno.ESTALE
    (share.parent / "outside").rename(share / "d")
    look_up(guest, e.nodeid, ".")
    (share / "d").rename(share.parent / "outside")
    # It has it, as if it had it open; but what is above it it does not get.
    assert ask(guest, e.nodeid, "..") == errno.ESTALE
    (share / "d").mkdir()
    (share.parent / "outside/e").rename(share / "d/e")
    assert look_up(guest, e.nodeid, "..").nodeid == look_up(guest, ROOT_ID, "d").nodeid


def test_so_many_are_remembered(guest: RawGuest, share: Path) -> None:
    inodes = guest.device.fs.inodes
    inodes.max_remembered, inodes.max_open = 10, 0
    for number in range(30):
        (share / str(number)).touch()
    nodeids = []
    for number in range(30):
        nodeids.append(look_up(guest, ROOT_ID, str(number)).nodeid)
        forget(guest, nodeids[-1])
    assert (inodes.live, inodes.idle, inodes.remembered) == (0, 1, 10)
    assert [n for n in range(30) if ask(guest, nodeids[n], ".") != errno.ESTALE] == list(range(19, 30))


def test_only_what_it_was_given_is_found(guest: RawGuest, share: Path, forgotten: list[EntryOut]) -> None:
    given = {entry.nodeid for entry in forgotten} | {ROOT_ID}
    chance = random.Random(1)
    for nodeid in [*range(2, 200), *(chance.getrandbits(64) for _ in range(200)), *(n ^ 1 << 40 for n in given)]:
        if nodeid not in given:
            assert ask(guest, nodeid, ".") == errno.ESTALE
            assert ask(guest, nodeid, "..") == errno.ESTALE


def test_another_session_has_other_handles(guest: RawGuest, forgotten: list[EntryOut]) -> None:
    guest.request(Opcode.DESTROY, 0)
    guest.initialize()
    assert [ask(guest, entry.nodeid, ".") for entry in forgotten] == [errno.ESTALE] * 3
    assert find(guest, "d").generation != forgotten[0].generation
    assert guest.device.fs.inodes.remembered == 0


@pytest.mark.parametrize("body", [b".", b"..", b"...\0", b".\0\0", b"..\0x\0", b"./\0", b"\0", b""])
def test_other_names_with_dots_are_names(guest: RawGuest, body: bytes) -> None:
    assert guest.request(Opcode.LOOKUP, ROOT_ID, body)[0] in (errno.EINVAL, errno.ENOENT)
