"""Changes of what is leased to another guest: they wait, and hold up nobody (docs/concepts/leases.md)."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coherent_vfs.server.caching.parking import Parked
from coherent_vfs.server.front_ends import FrontEnds
from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    IN_HEADER,
    INTERRUPT_IN,
    LINK_IN,
    MKDIR_IN,
    OPEN_IN,
    OPEN_OUT,
    RENAME2_IN,
    FattrFlag,
    Opcode,
)
from coherent_vfs.server.operations.table import PYTHON
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request
from coherent_vfs.server.vhost_user.connection import Connection
from coherent_vfs.server.vhost_user.interface import Busy, Region, Ring
from coherent_vfs.server.vhost_user.messages import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    HeaderFlag,
    MemoryRegion,
    Message,
    VringAddress,
    VringState,
    pack_memory_table,
    pack_u64,
    pack_vring_address,
    pack_vring_state,
    unpack_vring_state,
)
from coherent_vfs.server.vhost_user.messages import Request as VhostRequest
from tests.unit.server.fake_device import leaked, open_fds
from tests.unit.server.leased import (
    LEASE_MAX,
    LONGEST,
    LeaseDomain,
    change,
    entry_valid,
    find,
    get_attributes,
    look_up,
    parked,
    set_attributes,
    write_body,
)
from tests.unit.server.raw_guest import (
    AVAIL,
    DESC,
    GUEST,
    HEAP,
    HIPRIO,
    NEXT,
    PENDING_MAX,
    QUEUE_SIZE,
    SIZE,
    USED,
    USER,
    WRITE,
    Desc,
    Pending,
    RawGuest,
    raw_guest,
)

ExpectLog = Callable[[str], None]
LOCKER = 99
"""The number of a backend that is not there."""
MODE = set_attributes(FattrFlag.MODE, mode=0o600)


def mode_of(domain: LeaseDomain, path: str = "d/f") -> int:
    return (domain.share / path).stat().st_mode & 0o777


def slot_of(domain: LeaseDomain, path: str) -> int:
    status = (domain.share / path).stat()
    return domain.table.inode_slot(status.st_dev, status.st_ino)


def lock(domain: LeaseDomain, slot: int) -> None:
    """As another backend does that is in the middle of a change."""
    assert domain.leases.lock(slot, LOCKER)


def state_of(domain: LeaseDomain) -> dict[str, os.stat_result]:
    """What there is in the directory d."""
    return {path.name: path.lstat() for path in (domain.share / "d").iterdir()}


def park(guest: RawGuest, other: RawGuest) -> Pending:
    """A chmod of d/f by the other guest, which waits for this guest's lease."""
    get_attributes(guest, find(guest, "d/f"))
    pending = other.post(Opcode.SETATTR, find(other, "d/f"), MODE)
    assert parked(other, pending)
    return pending


class FrontEnd:
    """Takes the place of QEMU: sets a guest's device up anew by messages, as everything else is done by the loop."""

    def __init__(self, guest: RawGuest, directory: Path) -> None:
        self.guest = guest
        guest.device.reset()
        path = str(directory / "front-end")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.setblocking(False)
        self.front_ends = FrontEnds(self._listener, guest.device, guest.loop)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._connection = Connection(self._socket)
        memory = pack_memory_table([MemoryRegion(GUEST, SIZE, USER, 0)])
        self.do(VhostRequest.SET_FEATURES, pack_u64(VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES))
        self.do(VhostRequest.SET_MEM_TABLE, memory, guest.memory_fd)
        self.do(VhostRequest.SET_VRING_NUM, pack_vring_state(VringState(1, QUEUE_SIZE)))
        self.do(VhostRequest.SET_VRING_BASE, pack_vring_state(VringState(1, guest.avail_idx)))
        address = VringAddress(1, USER + DESC, USER + USED, USER + AVAIL)
        self.do(VhostRequest.SET_VRING_ADDR, pack_vring_address(address))
        self.do(VhostRequest.SET_VRING_ENABLE, pack_vring_state(VringState(1, 1)))
        self.do(VhostRequest.SET_VRING_KICK, pack_u64(1), guest.kick)
        guest.initialize()

    def send(self, request: VhostRequest, payload: bytes, *fds: int) -> None:
        """Ask, and do not wait for the answer."""
        self._connection.send(request, payload, fds, flags=HeaderFlag.NEED_REPLY)

    def answer(self) -> Message:
        """Let the loop run until the answer is there."""
        answers: list[Message] = []

        def answered() -> bool:
            if message := self._connection.receive():
                answers.append(message)
            return bool(answers)

        self.guest.wait(answered)
        return answers[0]

    def do(self, request: VhostRequest, payload: bytes, *fds: int) -> None:
        """Ask for what must succeed."""
        self.send(request, payload, *fds)
        assert self.answer().payload == pack_u64(0)

    def hang_up(self) -> None:
        self._connection.close()

    def close(self) -> None:
        self.front_ends.close()
        self._connection.close()
        self._listener.close()


@contextmanager
def front_end(guest: RawGuest, directory: Path) -> Iterator[FrontEnd]:
    """A front-end of a guest, which leaves nothing open; what guests know of the share is open besides."""
    before = open_fds()
    end = FrontEnd(guest, directory)
    try:
        yield end
    finally:
        end.close()
    assert not [target for target in leaked(before).values() if not target.startswith("/")]


def rest_is_served(guest: RawGuest, nodeid: int) -> None:
    for _ in range(3):
        get_attributes(guest, nodeid)


@pytest.mark.parametrize(
    ("opcode", "path", "body"),
    [
        (Opcode.SETATTR, "d/f", MODE),
        (Opcode.OPEN, "d/f", OPEN_IN.pack(os.O_WRONLY | os.O_TRUNC, 0)),
        (Opcode.CREATE, "d", CREATE_IN.pack(os.O_RDWR, 0o100600, 0, 0) + b"new\0"),
        (Opcode.MKDIR, "d", MKDIR_IN.pack(0o755, 0) + b"new\0"),
        (Opcode.SYMLINK, "d", b"new\0target\0"),
        (Opcode.UNLINK, "d", b"f\0"),
        (Opcode.RENAME2, "d", b"f\0new\0"),
        (Opcode.LINK, "d", b"new\0"),
    ],
)
def test_a_change_waits_until_the_leases_of_others_are_over(
    domain: LeaseDomain, opcode: Opcode, path: str, body: bytes
) -> None:
    with domain.guest() as guest, domain.guest() as other:
        parent = find(guest, "d")
        nodeid, file, unconcerned = find(other, path), find(other, "d/f"), find(other, "e/h")
        body = {
            Opcode.RENAME2: RENAME2_IN.pack(nodeid, 0) + body,
            Opcode.LINK: LINK_IN.pack(file) + body,
        }.get(opcode, body)
        began = time.monotonic()
        # All that any of the changes concerns.
        assert get_attributes(guest, parent)[0] == LONGEST
        assert entry_valid(look_up(guest, parent, "f")[0]) == LONGEST
        assert entry_valid(look_up(guest, parent, "new")[0]) == LONGEST
        before = state_of(domain)
        pending = other.post(opcode, nodeid, body)
        assert parked(other, pending)
        rest_is_served(other, unconcerned)
        rest_is_served(guest, parent)
        assert state_of(domain) == before
        other.wait(lambda: pending.done)
        assert time.monotonic() - began >= LEASE_MAX
        assert pending.outcome[0] == 0
        assert state_of(domain) != before
        assert other.device.parked == 0
        assert other.device.fs.publisher.held == 1


def test_a_write_waits(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        nodeid = find(other, "d/f")
        fh, _, _ = OPEN_OUT.unpack(other.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_WRONLY, 0))[1])
        get_attributes(guest, find(guest, "d/f"))
        pending = other.post(Opcode.WRITE, nodeid, write_body(b"CON", fh=fh))
        assert parked(other, pending)
        # Looked at before it is due it goes on waiting, and counts once.
        other.device.fs.wake()
        assert parked(other, pending)
        assert (domain.share / "d/f").read_bytes() == b"content"
        other.wait(lambda: pending.done)
        assert pending.outcome[0] == 0
        assert (domain.share / "d/f").read_bytes() == b"CONtent"
        assert other.device.fs.publisher.held == 1


def test_own_leases_are_no_obstacle(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid = find(guest, "d/f")
        assert get_attributes(guest, nodeid)[0] == LONGEST
        assert guest.request(Opcode.SETATTR, nodeid, MODE)[0] == 0
        assert guest.request(Opcode.UNLINK, find(guest, "d"), b"f\0")[0] == 0
        assert guest.device.fs.publisher.held == 0


def test_other_things_are_no_obstacle(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        get_attributes(guest, find(guest, "d/f"))
        assert other.request(Opcode.SETATTR, find(other, "e/h"), MODE)[0] == 0
        assert other.device.fs.publisher.held == 0


def test_no_new_lease_while_a_change_waits(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other, domain.guest() as third:
        nodeids = [find(each, "d/f") for each in (guest, other, third)]
        get_attributes(guest, nodeids[0])
        pending = other.post(Opcode.SETATTR, nodeids[1], MODE)
        assert parked(other, pending)
        for each, nodeid in zip((guest, other, third), nodeids, strict=True):
            assert get_attributes(each, nodeid)[0] == 0
        other.wait(lambda: pending.done)


def test_a_guest_that_asks_all_the_time_does_not_keep_a_change_from_being_made(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        nodeid, changed = find(guest, "d/f"), find(other, "d/f")
        get_attributes(guest, nodeid)
        began = time.monotonic()
        pending = other.post(Opcode.SETATTR, changed, MODE)

        def asked_meanwhile() -> bool:
            get_attributes(guest, nodeid)
            return pending.done

        other.wait(asked_meanwhile)
        # One lease, and what a loaded machine takes to come round.
        assert time.monotonic() - began < LEASE_MAX + 30


def test_a_change_that_only_meets_a_lock_closes_nothing(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid, slot = find(guest, "d/f"), slot_of(domain, "d/f")
        lock(domain, slot)
        pending = guest.post(Opcode.SETATTR, nodeid, MODE)
        assert parked(guest, pending)
        assert domain.leases.grant(slot, LOCKER, domain.table.stamp(), 1)
        domain.leases.release(LOCKER)
        guest.wait(lambda: pending.done)
        assert guest.device.fs.publisher.held == 0


def test_what_is_closed_stays_so_while_locks_keep_the_change_waiting(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid, slot = find(guest, "d/f"), slot_of(domain, "d/f")
        lock(domain, slot)
        pending = guest.post(Opcode.SETATTR, nodeid, MODE)
        # As if it had waited for leases before.
        domain.leases.close_until(slot, 200_000)
        over = time.monotonic() + 0.3
        guest.wait(lambda: time.monotonic() > over)
        assert parked(guest, pending)
        assert not domain.leases.grant(slot, LOCKER, domain.table.stamp(), 1)
        domain.leases.release(LOCKER)
        guest.wait(lambda: pending.done)


def test_many_changes_wait_at_once_and_all_are_made(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        parent, changed = find(guest, "d"), find(other, "d")
        get_attributes(guest, parent)
        body = CREATE_IN.pack(os.O_RDWR, 0o100600, 0, 0)
        pending = [other.post(Opcode.CREATE, changed, body + b"%d\0" % number) for number in range(PENDING_MAX)]
        assert other.device.parked == PENDING_MAX
        rest_is_served(other, changed)
        other.wait(lambda: all(each.done for each in pending))
        assert all(each.outcome[0] == 0 for each in pending)
        assert {f"{number}" for number in range(PENDING_MAX)} < state_of(domain).keys()


# --- the guest gives up ----------------------------------------------------------------------------------------


def test_an_interrupted_change_is_answered_at_once_and_not_made(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        nodeid = find(other, "d/f")
        get_attributes(guest, find(guest, "d/f"))
        old = mode_of(domain)
        pending = other.post(Opcode.SETATTR, nodeid, MODE)
        kept = other.post(Opcode.SETATTR, nodeid, set_attributes(FattrFlag.MODE, mode=0o640))
        # One about nothing, and one about what is served already, do no harm.
        other.tell(Opcode.INTERRUPT, 0, INTERRUPT_IN.pack(123456))
        other.tell(Opcode.INTERRUPT, 0, INTERRUPT_IN.pack(pending.unique - 1))
        assert not pending.done
        other.tell(Opcode.INTERRUPT, 0, INTERRUPT_IN.pack(pending.unique))
        assert pending.outcome == (errno.EINTR, b"")
        assert parked(other, kept)
        assert mode_of(domain) == old
        other.wait(lambda: kept.done)
        assert mode_of(domain) == 0o640


@pytest.mark.parametrize("disabled", [False, True], ids=["as it is", "disabled first, as by QEMU"])
def test_stopping_the_ring_finishes_what_waits(domain: LeaseDomain, *, disabled: bool) -> None:
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        with pytest.raises(Busy):
            other.device.enable_ring(1, False) if disabled else other.device.stop_ring(1)
        assert parked(other, pending)
        other.drain()
        if disabled:
            other.device.enable_ring(1, False)
        assert other.device.stop_ring(1) == other.avail_idx
        assert pending.outcome[0] == 0
        assert mode_of(domain) == 0o600


STOPS = [
    (VhostRequest.GET_VRING_BASE, pack_vring_state(VringState(1, 0)), False),
    (VhostRequest.SET_VRING_ENABLE, pack_vring_state(VringState(1, 0)), False),
    (VhostRequest.RESET_OWNER, b"", False),
    (VhostRequest.SET_VRING_NUM, pack_vring_state(VringState(1, QUEUE_SIZE // 2)), False),
    (VhostRequest.SET_VRING_BASE, pack_vring_state(VringState(1, 0)), False),
    (VhostRequest.SET_VRING_ADDR, pack_vring_address(VringAddress(1, USER + HIPRIO, USER + USED, USER + AVAIL)), False),
    (VhostRequest.SET_VRING_KICK, pack_u64(1), True),
]
"""All that stops a ring or disables it, and whether a descriptor comes with it."""


@pytest.mark.parametrize(("request_", "payload", "kick"), STOPS, ids=[stop[0].name for stop in STOPS])
def test_the_loop_goes_on_while_a_ring_finishes_what_waits(
    domain: LeaseDomain, tmp_path: Path, request_: VhostRequest, payload: bytes, kick: bool
) -> None:
    with domain.guest() as guest, domain.guest(init=False) as other, front_end(other, tmp_path) as end:
        pending, base = park(guest, other), other.avail_idx
        done_at_ring: list[bool] = []
        other.loop.call_later(LEASE_MAX / 8, lambda: done_at_ring.append(pending.done))
        end.send(request_, payload, *[other.kick] * kick)
        answer = end.answer()
        assert done_at_ring == [False], "a timer rings before what is parked is done"
        assert pending.outcome[0] == 0
        assert mode_of(domain) == 0o600
        if request_ == VhostRequest.GET_VRING_BASE:
            assert unpack_vring_state(answer.payload) == VringState(1, base)
        else:
            assert answer.payload == pack_u64(0)


def test_a_ring_that_finishes_takes_nothing_new_and_does_not_spin(domain: LeaseDomain, tmp_path: Path) -> None:
    with domain.guest() as guest, domain.guest(init=False) as other, front_end(other, tmp_path) as end:
        pending, base, nodeid = park(guest, other), other.avail_idx, find(guest, "d/f")
        end.send(VhostRequest.GET_VRING_BASE, pack_vring_state(VringState(1, 0)))
        other.serve()
        late = other.post(Opcode.GETATTR, nodeid, bytes(16))
        before = time.thread_time()
        other.loop.call_later(LEASE_MAX / 4, other.loop.stop)
        other.loop.run()
        assert time.thread_time() - before < LEASE_MAX / 8
        assert parked(other, pending)
        assert unpack_vring_state(end.answer().payload) == VringState(1, base)
        assert pending.outcome[0] == 0
        assert not late.done


def test_a_front_end_that_goes_while_its_ring_finishes(
    domain: LeaseDomain, tmp_path: Path, expect_log: ExpectLog
) -> None:
    expect_log("connection lost")
    with domain.guest() as guest, domain.guest(init=False) as other, front_end(other, tmp_path) as end:
        pending = park(guest, other)
        end.send(VhostRequest.SET_VRING_KICK, pack_u64(1), other.kick)
        other.serve()
        end.hang_up()
        other.wait(lambda: not other.device.fs.initialized)
        assert pending.outcome[0] == 0


def test_a_backend_that_ends_while_a_ring_finishes(domain: LeaseDomain, tmp_path: Path) -> None:
    with domain.guest() as guest, domain.guest(init=False) as other, front_end(other, tmp_path) as end:
        pending = park(guest, other)
        end.send(VhostRequest.SET_VRING_KICK, pack_u64(1), other.kick)
        other.serve()
        assert parked(other, pending)
        end.front_ends.close()
        other.serve()
        assert not pending.done


def test_a_reset_drops_what_waits(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        old = mode_of(domain)
        other.device.reset()
        assert other.device.parked == 0
        # The lease's own guest has nobody to wait for, and what comes after waits for nothing else than the lease.
        change(guest, Opcode.SETATTR, find(guest, "d/f"), set_attributes(FattrFlag.MODE, mode=0o604))
        assert not pending.done
        assert old != mode_of(domain) == 0o604


# --- hostile and strange guests ----------------------------------------------------------------------------------


def test_a_parked_request_that_is_rewritten_is_another_request(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        nodeid = find(other, "d/f")
        for at, value in (
            (4, struct.pack("<I", 4711)),  # opcode
            (0, struct.pack("<I", 0xFFFFFFF0)),  # length
            (0, struct.pack("<I", 3)),
            (16, struct.pack("<Q", 0xDEAD)),  # nodeid
            (40, os.urandom(88)),  # body
        ):
            guest.wait(lambda: get_attributes(guest, find(guest, "d/f"))[0] > 0)
            pending = other.post(Opcode.SETATTR, nodeid, MODE)
            assert parked(other, pending)
            other.memory[pending.at + at : pending.at + at + len(value)] = value
            other.wait(lambda pending=pending: pending.done)  # type: ignore[misc]  # a lambda of its own
            rest_is_served(other, nodeid)
            assert other.device.parked == 0


@pytest.mark.parametrize(
    "descs",
    [
        [Desc(GUEST + SIZE, 128)],
        [Desc(GUEST, 1 << 31)],
        [Desc(0, 128)],
    ],
)
def test_a_chain_that_is_broken_meanwhile_ends_the_session(
    domain: LeaseDomain, descs: list[Desc], expect_log: ExpectLog
) -> None:
    with domain.guest() as guest, domain.guest() as other:
        old = mode_of(domain)
        pending = park(guest, other)
        other.write_table(descs, DESC + 16 * pending.head)
        expect_log("broke the ring")
        other.wait(lambda: not other.device.fs.initialized)
        assert mode_of(domain) == old
        # Nobody else is the worse for it.
        change(guest, Opcode.SETATTR, find(guest, "d/f"), MODE)
        other.device.reset()


def test_a_parked_chain_that_is_offered_again_and_again(domain: LeaseDomain, expect_log: ExpectLog) -> None:
    expect_log("broke the ring")
    with domain.guest() as guest, domain.guest() as other:
        nodeid = find(other, "d/f")
        get_attributes(guest, find(guest, "d/f"))
        pending = other.post(Opcode.SETATTR, nodeid, MODE)
        most = 0
        for _ in range(3 * QUEUE_SIZE // 32):
            for _ in range(32):
                other.offer(pending.head)
            other.serve()
            most = max(most, other.device.parked)
        assert 32 < most <= QUEUE_SIZE
        assert other.device.parked == 0


def test_rings_that_are_rewritten_meanwhile(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        # The same chain once more, as another request: the guest has two replies in one place.
        other.offer(pending.head)
        other.serve()
        assert other.device.parked == 2
        other.wait(lambda: other.device.parked == 0)
        assert mode_of(domain) == 0o600
        rest_is_served(other, find(other, "d/f"))


def test_the_memory_table_comes_again_while_a_change_waits(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        moved = os.memfd_create("moved")
        os.pwrite(moved, other.memory[:], 0)
        other.device.set_memory([Region(GUEST, SIZE, USER, 0, os.dup(moved))])
        old, other.memory = other.memory, mmap.mmap(moved, SIZE)
        os.close(moved)
        # Nothing may go to where the memory was.
        old[:] = bytes(SIZE)
        other.wait(lambda: pending.done)
        assert pending.outcome[0] == 0
        assert mode_of(domain) == 0o600
        assert old[:] == bytes(SIZE)
        old.close()
        rest_is_served(other, find(other, "d/f"))


def test_the_memory_goes_away_while_a_change_waits(domain: LeaseDomain, expect_log: ExpectLog) -> None:
    with domain.guest() as guest, domain.guest() as other:
        old = mode_of(domain)
        pending = park(guest, other)
        expect_log("guest's session ended")
        other.device.set_memory([])
        change(guest, Opcode.SETATTR, find(guest, "d/f"), set_attributes(FattrFlag.MODE, mode=0o604))
        other.loop.call_later(0, other.loop.stop)
        other.loop.run()
        assert not pending.done
        assert old != mode_of(domain) == 0o604


# --- who is woken --------------------------------------------------------------------------------------------------


def test_what_a_parked_request_wakes_when_it_is_served_is_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its own queue had its turn before."""
    served: list[str] = []

    def waits(fs: FileSystem, request: Request) -> bytes:
        served.append("waits")
        if served.count("waits") == 1:
            raise Parked(60)
        return b""

    def wakes(fs: FileSystem, request: Request) -> bytes:
        served.append("wakes")
        if served.count("wakes") == 1:
            raise Parked(0.05)
        fs.wake()
        return b""

    monkeypatch.setitem(PYTHON, 61, waits)
    monkeypatch.setitem(PYTHON, 62, wakes)
    with raw_guest(tmp_path) as guest:
        kick, at = os.eventfd(0), USER + HIPRIO
        guest.device.start_ring(0, Ring(QUEUE_SIZE, at + DESC, at + USED, at + AVAIL, 0, os.dup(kick), None, None))
        guest.device.enable_ring(0, True)
        pending = guest.post(61, 1)
        message = IN_HEADER.pack(IN_HEADER.size, 62, 1000, 1, 0, 0, 1, 0)
        guest.memory[HEAP : HEAP + len(message)] = message
        table = [Desc(GUEST + HEAP, len(message), NEXT, 1), Desc(GUEST + HEAP + 4096, 64, WRITE)]
        guest.write_table(table, HIPRIO + DESC)
        guest.memory[HIPRIO + AVAIL + 2 : HIPRIO + AVAIL + 4] = struct.pack("<H", 1)
        os.eventfd_write(kick, 1)
        guest.wait(lambda: pending.done, 20)
        assert served == ["waits", "wakes", "wakes", "waits"]
        os.close(kick)


def test_a_change_whose_directory_is_forgotten_meanwhile_is_committed(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid = find(guest, "d")
        name = domain.table.name_slot(slot_of(domain, "d"), b"new")
        before = domain.table.slot(name)
        with pytest.raises(KeyError), guest.device.fs.changing(names=[(nodeid, b"new")]):
            assert domain.leases.locked(name)
            guest.tell(Opcode.FORGET, nodeid, struct.pack("<Q", 1))
            raise KeyError
        assert domain.table.slot(name) > before
        assert not domain.leases.locked(name)
