"""Files that a guest makes smaller while others may have mapped them; a device whose guest may misbehave."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.server.dax.truncations import Truncations
from coherent_vfs.server.fuse.protocol import FALLOCATE_IN, FORGET_IN, OPEN_IN, FattrFlag, Opcode
from tests.unit.server.fake_device import leaked, open_fds
from tests.unit.server.leased import LeaseDomain, find, get_attributes, look_up, parked, set_attributes, write_body
from tests.unit.server.raw_guest import Pending, RawGuest

COLLAPSE = 0x08


class Allocator:
    """As coherence.client.dax: truncations are granted when the test says so."""

    def __init__(self) -> None:
        self.coordinates = True
        self.has_news = False
        self.granted: set[int] = set()
        self.truncations: dict[int, tuple[str, int, Callable[[], None]]] = {}
        """Those that have not ended: name, size."""
        self._last = 0

    def truncate(self, fd: int, size: int, done: Callable[[], None]) -> int:
        self._last += 1
        self.truncations[self._last] = Path(f"/proc/self/fd/{fd}").readlink().name, size, done
        return self._last

    def truncated(self, token: int) -> None:
        del self.truncations[token]

    def is_granted(self, token: int) -> bool:
        return not self.coordinates or token in self.granted

    def grant(self) -> None:
        self.granted.update(self.truncations)
        for _, _, done in list(self.truncations.values()):
            done()

    @property
    def asked(self) -> list[tuple[str, int]]:
        """Names and sizes of what has not ended."""
        return [(name, size) for name, size, _ in self.truncations.values()]


class Files:
    """Files by node ids from 1 on."""

    def __init__(self, *paths: Path) -> None:
        self.paths = dict(enumerate(paths, 1))
        self.woken = 0

    def reopen(self, nodeid: int, flags: int) -> int:
        return os.open(self.paths[nodeid], flags)

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
def allocator() -> Allocator:
    return Allocator()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Two files of 100 bytes, which nobody has open afterwards."""
    before = open_fds()
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(100))
    yield Files(*paths)
    assert not leaked(before)


def test_it_waits_until_it_is_granted(allocator: Allocator, files: Files) -> None:
    truncations = Truncations(allocator, files)
    assert not truncations.begin(7, 1, 50)
    assert not truncations.begin(7, 1, 50)
    assert allocator.asked == [("a", 50)]
    allocator.grant()
    assert files.woken == 1
    assert truncations.begin(7, 1, 50)
    truncations.end(7)
    truncations.end(7)
    assert not allocator.truncations


def test_where_nobody_has_to_be_asked(allocator: Allocator, files: Files) -> None:
    truncations = Truncations(allocator, files)
    assert truncations.begin(7, 1, 100)
    allocator.coordinates = False
    assert truncations.begin(7, 1, 50)
    truncations.end(7)
    assert not allocator.truncations


def test_what_is_granted_is_no_other_file_and_no_smaller_size(allocator: Allocator, files: Files) -> None:
    truncations = Truncations(allocator, files)
    truncations.begin(7, 1, 50)
    allocator.grant()
    assert truncations.begin(7, 1, 60)
    assert not truncations.begin(7, 1, 40)
    assert allocator.asked == [("a", 40)]
    allocator.grant()
    assert not truncations.begin(7, 2, 40)
    assert allocator.asked == [("b", 40)]
    truncations.clear()
    assert not allocator.truncations


def test_what_was_granted_too_long_ago_is_asked_for_again(allocator: Allocator, files: Files) -> None:
    truncations = Truncations(allocator, files)
    truncations.begin(7, 1, 50)
    allocator.grant()
    assert truncations.begin(7, 1, 50)
    assert truncations.is_current(7)
    allocator.granted.clear()
    before = set(allocator.truncations)
    assert not truncations.is_current(7)
    assert not truncations.begin(7, 1, 50)
    assert not truncations.begin(7, 1, 50)
    assert allocator.asked == [("a", 50)]
    assert not before & set(allocator.truncations)
    allocator.grant()
    assert truncations.begin(7, 1, 50)
    assert truncations.is_current(7)
    truncations.end(7)
    # Nobody is asked, and nothing was said since.
    allocator.coordinates = False
    assert truncations.begin(8, 1, 50)
    assert truncations.is_current(8)
    allocator.has_news = True
    assert not truncations.is_current(8)


def test_others_that_cannot_be_asked_are_not_cut_off(allocator: Allocator, files: Files) -> None:
    files.paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        Truncations(allocator, files).begin(7, 1, 50)
    assert not allocator.truncations


# --- of a device --------------------------------------------------------------------------------------------


class Window:
    """A guest's window in which nothing is mapped again, unless the test says so."""

    def __init__(self) -> None:
        self.restored: list[int] = []

    def restore(self, nodeid: int, size: int) -> None:
        self.restored.append(nodeid)

    def begin_session(self) -> None:
        pass

    def forget(self, unique: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def guest(domain: LeaseDomain, allocator: Allocator) -> Iterator[RawGuest]:
    """A guest on a share with d/f (7 bytes), d/g and fifo."""
    with domain.guest() as guest:
        guest.device.fs.mapped.truncate_with(Truncations(allocator, guest.device.fs))
        guest.device.fs.mapped.use_window(Window())  # type: ignore[arg-type]  # what is used of it
        yield guest
    assert not allocator.truncations


def truncate_to(size: int = 0) -> bytes:
    return set_attributes(FattrFlag.SIZE, size=size)


def size_of(domain: LeaseDomain, path: str = "d/f") -> int:
    return (domain.share / path).stat().st_size


def outcome(guest: RawGuest, pending: Pending) -> int:
    guest.wait(lambda: pending.done)
    return pending.outcome[0]


@pytest.mark.parametrize("opcode", [Opcode.SETATTR, Opcode.OPEN])
def test_a_request_waits_and_holds_up_nobody(
    domain: LeaseDomain, guest: RawGuest, allocator: Allocator, opcode: Opcode
) -> None:
    nodeid = find(guest, "d/f")
    pending = guest.post(
        opcode, nodeid, truncate_to() if opcode == Opcode.SETATTR else OPEN_IN.pack(os.O_TRUNC | os.O_RDWR, 0)
    )
    assert guest.device.parked == 1
    assert get_attributes(guest, nodeid)[1].size == size_of(domain) == 7
    allocator.grant()
    assert outcome(guest, pending) == 0
    assert size_of(domain) == 0
    assert not allocator.truncations


def test_leases_of_others_are_waited_for_first(domain: LeaseDomain, guest: RawGuest, allocator: Allocator) -> None:
    """As long as that takes the others have the whole file."""
    nodeid = find(guest, "d/f")
    with domain.guest() as other:
        assert get_attributes(other, find(other, "d/f"))[0] > 0
        pending = guest.post(Opcode.SETATTR, nodeid, truncate_to())
        assert guest.device.parked == 1
        assert not allocator.truncations
        guest.wait(lambda: bool(allocator.truncations))
        allocator.grant()
        assert outcome(guest, pending) == 0
    assert size_of(domain) == 0


@pytest.mark.parametrize("coordinates", [True, False], ids=["asked", "nobody-to-ask"])
@pytest.mark.parametrize("opcode", [Opcode.SETATTR, Opcode.OPEN, Opcode.FALLOCATE])
def test_what_coherenced_has_said_is_heeded_first(
    domain: LeaseDomain, guest: RawGuest, allocator: Allocator, opcode: Opcode, coordinates: bool
) -> None:
    """It may be that the grant is over, or that the first other window has come."""
    os.truncate(domain.share / "d/f", 8192)
    nodeid = find(guest, "d/f")
    _, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDWR, 0))
    fh = int.from_bytes(reply[:8], "little")
    body = {
        Opcode.SETATTR: truncate_to(),
        Opcode.OPEN: OPEN_IN.pack(os.O_TRUNC | os.O_RDWR, 0),
        Opcode.FALLOCATE: FALLOCATE_IN.pack(fh, 0, 4096, COLLAPSE),
    }[opcode]
    allocator.coordinates = coordinates
    allocator.has_news = True
    pending = guest.post(opcode, nodeid, body)
    allocator.grant()
    for _ in range(3):
        assert guest.request(Opcode.GETATTR, nodeid, bytes(16))[0] == 0
        assert guest.device.parked == 1
    assert size_of(domain) == 8192
    # This is the news.
    allocator.coordinates = True
    allocator.granted.clear()
    allocator.has_news = False
    guest.wait(lambda: len(allocator.truncations) == 1)
    assert size_of(domain) == 8192
    allocator.grant()
    assert outcome(guest, pending) in (0, errno.EOPNOTSUPP)


def test_one_that_waited_for_leases_for_too_long(domain: LeaseDomain, guest: RawGuest, allocator: Allocator) -> None:
    nodeid = find(guest, "d/f")
    with domain.guest() as other:
        pending = guest.post(Opcode.SETATTR, nodeid, truncate_to())
        before = set(allocator.truncations)
        assert get_attributes(other, find(other, "d/f"))[0] > 0
        allocator.grant()
        assert parked(guest, pending)
        # Longer than the grant is good for.
        allocator.granted.clear()
        guest.wait(lambda: bool(allocator.truncations) and not before & set(allocator.truncations))
        assert size_of(domain) == 7
        allocator.grant()
        assert outcome(guest, pending) == 0
    assert size_of(domain) == 0


def test_what_is_no_file_is_not_opened(guest: RawGuest, allocator: Allocator) -> None:
    # To open a FIFO for writing takes until somebody reads it.
    assert guest.request(Opcode.SETATTR, find(guest, "fifo"), truncate_to())[0] == errno.EINVAL
    assert not allocator.truncations


def test_a_file_that_the_guest_forgets_meanwhile(domain: LeaseDomain, guest: RawGuest, allocator: Allocator) -> None:
    nodeid = find(guest, "d/f")
    pending = guest.post(Opcode.SETATTR, nodeid, truncate_to())
    guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))
    allocator.grant()
    assert outcome(guest, pending) in (0, errno.ESTALE)
    assert not allocator.truncations


def test_a_request_that_the_guest_makes_another_of(domain: LeaseDomain, guest: RawGuest, allocator: Allocator) -> None:
    nodeid, other = find(guest, "d/f"), find(guest, "d/g")
    pending = guest.post(Opcode.SETATTR, nodeid, truncate_to())
    at = pending.at
    # The same request is about another file now; then it has another number, too.
    guest.memory[at + 16 : at + 24] = other.to_bytes(8, "little")
    allocator.grant()
    guest.wait(lambda: allocator.asked == [("g", 0)])
    assert (size_of(domain), size_of(domain, "d/g")) == (7, 7)
    before = set(allocator.truncations)
    guest.memory[at + 8 : at + 16] = (pending.unique + 1000).to_bytes(8, "little")
    guest.wait(lambda: not before & set(allocator.truncations) and allocator.asked == [("g", 0)])
    allocator.grant()
    guest.wait(lambda: pending.done)
    assert not allocator.truncations
    assert size_of(domain) == 7


def test_collapse_of_more_than_there_is(guest: RawGuest, allocator: Allocator) -> None:
    nodeid = find(guest, "d/f")
    _, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDWR, 0))
    fh = int.from_bytes(reply[:8], "little")
    pending = guest.post(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 1 << 40, COLLAPSE))
    assert allocator.asked == [("f", 0)]
    allocator.grant()
    assert outcome(guest, pending) in (errno.EINVAL, errno.EOPNOTSUPP)


def test_a_device_that_is_stopped_cuts_nobody_off(domain: LeaseDomain, guest: RawGuest, allocator: Allocator) -> None:
    pending = guest.post(Opcode.SETATTR, find(guest, "d/f"), truncate_to())
    guest.drain()
    guest.device.enable_ring(1, False)
    assert pending.outcome[0] == errno.EINTR
    assert not allocator.truncations
    assert size_of(domain) == 7


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.LOOKUP, Opcode.WRITE, Opcode.SETATTR])
def test_a_device_that_is_stopped_waits_for_no_mapping(guest: RawGuest, opcode: Opcode) -> None:
    parent, nodeid = find(guest, "d"), find(guest, "d/f")
    _, reply = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDWR, 0))
    fh = int.from_bytes(reply[:8], "little")
    guest.device.fs.revoked_beyond(nodeid, 3)
    body = {
        Opcode.GETATTR: bytes(16),
        Opcode.LOOKUP: b"f\0",
        Opcode.WRITE: write_body(b"12345678", fh=fh),
        Opcode.SETATTR: truncate_to(100),
    }[opcode]
    pending = guest.post(opcode, parent if opcode == Opcode.LOOKUP else nodeid, body)
    assert guest.device.parked == 1
    guest.drain()
    guest.device.enable_ring(1, False)
    assert pending.outcome[0] == errno.EINTR
    guest.device.enable_ring(1, True)
    guest.device.fs.revoked_beyond(nodeid, None)
    assert look_up(guest, parent, "f")[1].size == 7


def test_two_guests_that_cut_one_file_off_do_not_wait_for_each_other(
    domain: LeaseDomain, guest: RawGuest, allocator: Allocator
) -> None:
    nodeid = find(guest, "d/f")
    pending = guest.post(Opcode.SETATTR, nodeid, truncate_to(5))
    assert allocator.asked == [("f", 5)]
    # The other's size is smaller; what it has us revoke is restored when all truncations are over.
    guest.device.fs.revoked_beyond(nodeid, 3)
    allocator.grant()
    guest.wait(lambda: not allocator.truncations)
    assert not pending.done
    os.truncate(domain.share / "d/f", 3)
    guest.device.fs.revoked_beyond(nodeid, None)
    guest.device.fs.wake()
    assert outcome(guest, pending) == 0
    assert size_of(domain) == 5


def test_scratch_stays_known_until_it_is_gone(guest: RawGuest) -> None:
    nodeid = find(guest, "d/f")
    guest.device.fs.revoked_beyond(nodeid, 3)
    guest.device.fs.revoked_beyond(nodeid, 100)
    pending = guest.post(Opcode.GETATTR, nodeid, bytes(16))
    assert guest.device.parked == 1
    guest.device.fs.revoked_beyond(nodeid, 2)
    guest.device.fs.revoked_beyond(nodeid, None)
    assert outcome(guest, pending) == 0


@pytest.mark.parametrize("writeback", [False, True])
def test_what_a_guest_knows_of_a_size(domain: LeaseDomain, writeback: bool) -> None:
    with domain.guest(cache="auto", writeback=writeback) as guest:
        nodeid = find(guest, "d/f")
        assert guest.device.fs.reached(nodeid) == 7
        os.truncate(domain.share / "d/f", 3)
        # It may have asked for that before it knew something else.
        get_attributes(guest, nodeid)
        assert guest.device.fs.reached(nodeid) == 7
        # One that delays writes heeds no size in any reply.
        assert guest.request(Opcode.SETATTR, nodeid, set_attributes(FattrFlag.MODE, mode=0o600))[0] == 0
        assert guest.device.fs.reached(nodeid) == (7 if writeback else 3)
