"""A share that is full: space that is free again is there at once, whoever made it free."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    ENTRY_OUT,
    FALLOCATE_IN,
    FORGET_IN,
    MKDIR_IN,
    OPEN_OUT,
    RELEASE_IN,
    RENAME_IN,
    Opcode,
)
from tests.small_tmpfs import small_tmpfs
from tests.unit.server.leased import lease_domain, write_body
from tests.unit.server.raw_guest import Pending, RawGuest, raw_guest

SIZE = 2 << 20
PIECE = 4000
"""Bytes that one request of a test writes."""
INODES = 20


@pytest.fixture
def share() -> Iterator[Path]:
    """An empty one of SIZE bytes and INODES inodes."""
    with small_tmpfs(size=str(SIZE), nr_inodes=str(INODES)) as path:
        yield path


@dataclass
class World:
    """A share, a guest on it, and the inodes that the guest knows.

    Attributes:
        opens: whether it has handles of what it opens.
    """

    share: Path
    guest: RawGuest
    opens: bool

    def create(self, name: str) -> tuple[int, int]:
        """Make a file: node id, fh."""
        body = CREATE_IN.pack(os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, 0, 0) + name.encode() + b"\0"
        error, reply = self.guest.request(Opcode.CREATE, 1, body)
        assert error == 0, os.strerror(error)
        return ENTRY_OUT.unpack_from(reply)[0], OPEN_OUT.unpack_from(reply, len(reply) - OPEN_OUT.size)[0]

    def look_up(self, name: str) -> int:
        """The node id of a file."""
        error, reply = self.guest.request(Opcode.LOOKUP, 1, name.encode() + b"\0")
        assert error == 0, os.strerror(error)
        return int(ENTRY_OUT.unpack_from(reply)[0])

    def write(self, nodeid: int, fh: int) -> None:
        """Write a piece at the beginning of a file."""
        error, _ = self.guest.request(Opcode.WRITE, nodeid, write_body(b"x" * PIECE, fh=fh))
        assert error == 0, os.strerror(error)

    def release(self, nodeid: int, fh: int) -> None:
        """Close a file."""
        if self.opens:
            assert self.guest.request(Opcode.RELEASE, nodeid, RELEASE_IN.pack(fh, 0, 0, 0))[0] == 0

    def unlink(self, name: str) -> None:
        assert self.guest.request(Opcode.UNLINK, 1, name.encode() + b"\0")[0] == 0

    def forget(self, nodeid: int) -> None:
        """As a guest that has looked it up once."""
        self.guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))

    def fill(self, name: str) -> None:
        """On the host, make a file that takes all that is free but for a page."""
        with (self.share / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free - 4096)

    @property
    def free(self) -> int:
        """Bytes that are free."""
        state = os.statvfs(self.share)
        return state.f_bfree * state.f_frsize

    def outcome(self, pending: Pending) -> int:
        """The errno of a request that may take a moment."""
        self.guest.wait(lambda: pending.done)
        return pending.outcome[0]


@pytest.fixture(params=["none", "auto", "shared", "shared-no-open"])
def world(request: pytest.FixtureRequest, share: Path) -> Iterator[World]:
    """A guest in each mode; in the last it opens no files."""
    mode, opens = request.param.removesuffix("-no-open"), not request.param.endswith("-no-open")
    if mode != "shared":
        with raw_guest(share, cache=mode) as guest:
            yield World(share, guest, opens)
        return
    # A table in a domain of its own; leases are not what this is about.
    domain = lease_domain(share)
    with domain.guest(opens=opens) as guest:
        yield World(share, guest, opens)


def test_a_deleted_file_is_free_when_it_is_forgotten(world: World) -> None:
    before = world.free
    nodeid, fh = world.create("a")
    world.write(nodeid, fh)
    world.release(nodeid, fh)
    world.unlink("a")
    world.forget(nodeid)
    assert world.free == before


def test_an_open_deleted_file_is_free_when_it_is_closed(world: World) -> None:
    before = world.free
    nodeid, fh = world.create("a")
    world.unlink("a")
    world.write(nodeid, fh)
    assert world.free < before
    world.release(nodeid, fh)
    world.forget(nodeid)
    assert world.free == before


def test_a_file_that_another_replaced(world: World) -> None:
    before = world.free
    for name in "ab":
        nodeid, fh = world.create(name)
        world.write(nodeid, fh)
        world.release(nodeid, fh)
    assert world.guest.request(Opcode.RENAME, 1, RENAME_IN.pack(1) + b"a\0b\0")[0] == 0
    world.forget(nodeid)
    assert world.free == before - 4096


def test_a_file_that_the_host_deletes_while_the_guest_knows_it(world: World) -> None:
    before = world.free
    nodeid, fh = world.create("a")
    world.write(nodeid, fh)
    world.release(nodeid, fh)
    (world.share / "a").unlink()
    world.forget(nodeid)
    assert world.free == before


def test_what_others_delete_makes_room_when_it_is_needed(world: World) -> None:
    """It was forgotten before, and is still open to be found again."""
    target, fh = world.create("target")
    world.fill("big")
    world.forget(world.look_up("big"))
    (world.share / "big").unlink()
    pending = world.guest.post(Opcode.FALLOCATE, target, FALLOCATE_IN.pack(fh, 0, SIZE // 2, 0))
    assert world.outcome(pending) == 0


def test_what_the_guest_forgets_while_a_request_finds_no_room(world: World) -> None:
    """FORGETs come on a queue of their own, which is looked at every now and then."""
    nodeid, fh = world.create("target")
    world.fill("big")
    big = world.look_up("big")
    world.write(nodeid, fh)
    world.unlink("big")
    pending = world.guest.post(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, SIZE // 2, 0))
    assert not pending.done
    world.forget(big)
    assert world.outcome(pending) == 0


def test_a_share_that_is_full_is_said_to_be_once(world: World) -> None:
    nodeid, fh = world.create("target")
    world.write(nodeid, fh)
    world.fill("big")
    requests = world.guest.device.fs.requests
    pending = world.guest.post(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, SIZE // 2, 0))
    assert world.outcome(pending) == errno.ENOSPC
    assert world.guest.device.parked == 0
    assert world.guest.device.fs.requests[Opcode.FALLOCATE] - requests.get(Opcode.FALLOCATE, 0) == 1


def test_inodes_are_short(world: World) -> None:
    """An empty directory is looked up and removed on the host, and the others are all in use."""
    (world.share / "dir").mkdir()
    world.forget(world.look_up("dir"))
    (world.share / "dir").rmdir()
    number = 0
    while os.statvfs(world.share).f_ffree:
        (world.share / str(number)).mkdir()
        number += 1
    pending = world.guest.post(Opcode.MKDIR, 1, MKDIR_IN.pack(0o755, 0) + b"new\0")
    assert world.outcome(pending) == 0
    pending = world.guest.post(Opcode.MKDIR, 1, MKDIR_IN.pack(0o755, 0) + b"newer\0")
    assert world.outcome(pending) == errno.ENOSPC


def test_a_device_that_is_stopped_does_not_wait_for_room(world: World) -> None:
    nodeid, fh = world.create("target")
    world.write(nodeid, fh)
    world.fill("big")
    pending = world.guest.post(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, SIZE // 2, 0))
    world.guest.drain()
    world.guest.device.enable_ring(1, False)
    assert pending.outcome[0] == errno.ENOSPC
