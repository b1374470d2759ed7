"""The ring: what a driver may do, and everything that it may not."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coherent_vfs.server.fuse.protocol import IN_HEADER, INIT_IN, OUT_HEADER, Opcode
from coherent_vfs.server.session import file_system
from coherent_vfs.server.vhost_user.interface import Region, Ring
from coherent_vfs.server.virtio.guest_memory import GuestMemory
from coherent_vfs.server.virtio.virtqueue import Virtqueue
from tests.unit.server.raw_guest import (
    AVAIL,
    DESC,
    GUEST,
    HEAP,
    INDIRECT,
    NEXT,
    QUEUE_SIZE,
    SIZE,
    USED,
    USER,
    WRITE,
    Desc,
    RawGuest,
    raw_guest,
)

REPLY = HEAP + (1 << 20)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[RawGuest]:
    with raw_guest(tmp_path) as guest:
        yield guest


def getattr_message(unique: int) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + 16, Opcode.GETATTR, unique, 1, 0, 0, 1, 0) + bytes(16)


def test_indirect_chain_in_small_pieces(guest: RawGuest) -> None:
    """The driver may cut a request wherever it likes, even in the middle of a header."""
    message = getattr_message(77)
    guest.memory[HEAP : HEAP + len(message)] = message
    pieces = [Desc(GUEST + HEAP + i, min(9, len(message) - i), NEXT, i // 9 + 1) for i in range(0, len(message), 9)]
    room = range(0, 120, 5)
    pieces += [Desc(GUEST + REPLY + 2 * i, 5, WRITE | NEXT, len(pieces) + n + 1) for n, i in enumerate(room)]
    pieces[-1] = Desc(pieces[-1].addr, 5, WRITE)
    table = HEAP + 0x8000
    guest.write_table(pieces, at=table)
    guest.write_table([Desc(GUEST + table, 16 * len(pieces), INDIRECT)])
    before = guest.used_idx
    guest.offer(0)
    guest.serve()
    assert guest.used(before) == (0, 120)
    reply = b"".join(guest.memory[REPLY + 2 * i : REPLY + 2 * i + 5] for i in room)
    length, error, unique = OUT_HEADER.unpack_from(reply)
    assert (length, error, unique) == (120, 0, 77)


@pytest.mark.parametrize("event_idx", [False, True])
def test_many_requests_at_once_wrap_the_ring(tmp_path: Path, event_idx: bool) -> None:
    with raw_guest(tmp_path, event_idx=event_idx) as guest:
        for _ in range(5000):
            assert guest.request(Opcode.GETATTR, 1, bytes(16))[0] == 0
        assert os.eventfd_read(guest.call) > 0


def test_the_driver_that_wants_no_interrupts_gets_none(tmp_path: Path) -> None:
    with raw_guest(tmp_path) as guest:
        os.eventfd_read(guest.call)
        guest.memory[AVAIL : AVAIL + 2] = struct.pack("<H", 1)
        guest.request(Opcode.GETATTR, 1, bytes(16))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(guest.call)


def break_head(guest: RawGuest) -> None:
    guest.offer(QUEUE_SIZE)


def break_avail_index(guest: RawGuest) -> None:
    guest.offer(0, index=guest.avail_idx + QUEUE_SIZE + 2)


def break_next(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 8, NEXT, QUEUE_SIZE)])
    guest.offer(0)


def break_by_loop(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 8, NEXT, 1), Desc(GUEST + HEAP, 8, NEXT, 0)])
    guest.offer(0)


def break_address(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + SIZE, 1)])
    guest.offer(0)


def break_address_below(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST - 1, 2)])
    guest.offer(0)


def break_length(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, SIZE)])
    guest.offer(0)


def break_by_wrapping_round(guest: RawGuest) -> None:
    guest.write_table([Desc(2**64 - 8, 16)])
    guest.offer(0)


def break_order(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 8, WRITE | NEXT, 1), Desc(GUEST + HEAP, 40)])
    guest.offer(0)


def break_indirect_in_indirect(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 16, INDIRECT)], at=HEAP)
    guest.write_table([Desc(GUEST + HEAP, 16, INDIRECT)])
    guest.offer(0)


def break_indirect_with_next(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 16, INDIRECT | NEXT, 1)])
    guest.offer(0)


def break_indirect_length(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 17, INDIRECT)])
    guest.offer(0)


def break_indirect_empty(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + HEAP, 0, INDIRECT)])
    guest.offer(0)


def break_indirect_address(guest: RawGuest) -> None:
    guest.write_table([Desc(GUEST + SIZE - 8, 16, INDIRECT)])
    guest.offer(0)


def break_indirect_too_long(guest: RawGuest) -> None:
    table = [Desc(GUEST + HEAP, 1, NEXT, i + 1) for i in range(1025)]
    guest.write_table(table, at=HEAP)
    guest.write_table([Desc(GUEST + HEAP, 16 * len(table), INDIRECT)])
    guest.offer(0)


def break_total_length(guest: RawGuest) -> None:
    table = [Desc(GUEST, SIZE, NEXT, i + 1) for i in range(1024)]
    table[-1] = Desc(GUEST, SIZE)
    guest.write_table(table, at=HEAP)
    guest.write_table([Desc(GUEST + HEAP, 16 * len(table), INDIRECT)])
    guest.offer(0)


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("break_ring", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_ring_ends_the_session_until_reset(
    guest: RawGuest, break_ring: Callable[[RawGuest], None], expect_log: Callable[[str], None]
) -> None:
    expect_log("guest's session ended")
    before = guest.used_idx
    break_ring(guest)
    guest.serve()
    assert guest.used_idx == before
    assert not guest.device.fs.initialized
    # Whatever comes after is left alone.
    guest.write_table([Desc(GUEST + HEAP, 40)])
    guest.offer(0)
    guest.serve()
    assert guest.used_idx == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.lists(
        st.builds(
            Desc,
            addr=st.one_of(
                st.integers(GUEST - 64, GUEST + SIZE + 64), st.integers(0, 2**64 - 1), st.just(GUEST + HEAP)
            ),
            len=st.one_of(st.integers(0, 256), st.integers(0, 2**32 - 1)),
            flags=st.integers(0, 7),
            next=st.integers(0, QUEUE_SIZE),
        ),
        max_size=QUEUE_SIZE,
    ),
    heap=st.binary(max_size=4096),
    head=st.integers(0, QUEUE_SIZE),
)
def test_any_ring_at_all(
    tmp_path: Path, expect_log: Callable[[str], None], table: list[Desc], heap: bytes, head: int
) -> None:
    """Random descriptors over random memory: an answer, nothing, or the end of the session; never worse."""
    expect_log("guest's session ended")
    with raw_guest(tmp_path) as guest:
        guest.memory[HEAP : HEAP + len(heap)] = heap
        guest.write_table(table)
        guest.offer(head)
        guest.serve()
        assert guest.used_idx in (1, 2)


def test_ring_outside_memory_is_refused() -> None:
    memory = GuestMemory()
    fd = os.memfd_create("guest")
    os.truncate(fd, SIZE)
    memory.add(GUEST, SIZE, USER, 0, fd)
    os.close(fd)
    for parts in ((USER + SIZE - 16, AVAIL, USED), (DESC, 0, USED), (DESC, AVAIL, 2**64 - 1)):
        with pytest.raises(ValueError, match="outside"):
            Virtqueue(memory, 64, *parts, 0, False)
    for size in (0, 3, 2048, -1):
        with pytest.raises(ValueError, match="power of two"):
            Virtqueue(memory, size, USER + DESC, USER + AVAIL, USER + USED, 0, False)


def test_memory_regions() -> None:
    memory = GuestMemory()
    fd = os.memfd_create("guest")
    os.truncate(fd, SIZE)
    memory.add(GUEST, SIZE // 2, USER, 0, fd)
    for wrong in (
        (GUEST + 4096, SIZE // 2, USER + SIZE, 0),
        (0, 0, 0, 0),
        (2**64 - 4096, 8192, 0, 0),
        (GUEST + SIZE, SIZE, USER + SIZE, 4096),
    ):
        with pytest.raises(ValueError):
            memory.add(*wrong, fd)
    memory.add(GUEST + SIZE // 2, SIZE // 2, USER + SIZE // 2, SIZE // 2, fd)
    assert len(memory) == 2
    with pytest.raises(KeyError):
        memory.remove(GUEST, SIZE, USER)
    memory.remove(GUEST, SIZE // 2, USER)
    assert len(memory) == 1
    os.close(fd)


def test_a_buffer_across_two_regions(guest: RawGuest, tmp_path: Path) -> None:
    """Regions that adjoin in the guest but not here: the buffer is cut in two."""
    fd = os.memfd_create("more")
    os.truncate(fd, 8192)
    guest.device.add_region(Region(GUEST + SIZE, 8192, USER + 2 * SIZE, 0, os.dup(fd)))
    (tmp_path / "f").write_bytes(bytes(range(256)) * 32)
    message = getattr_message(5)
    guest.memory[SIZE - 20 : SIZE] = message[:20]
    os.pwrite(fd, message[20:], 0)
    guest.write_table([Desc(GUEST + SIZE - 20, len(message), NEXT, 1), Desc(GUEST + REPLY, 120, WRITE)])
    before = guest.used_idx
    guest.offer(0)
    guest.serve()
    assert guest.used(before) == (0, 120)
    os.close(fd)


@pytest.fixture
def lost(expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How often a session ended as memory was gone."""
    words = "a part of the guest's memory is gone"
    expect_log(words)
    return lambda: caplog.text.count(words)


@pytest.mark.parametrize("init", [True, False], ids=["served before", "nothing served yet"])
def test_memory_that_is_cut_off_under_the_rings_ends_the_session(
    tmp_path: Path, lost: Callable[[], int], *, init: bool
) -> None:
    """As a guest's window is, where others make a file smaller: no SIGBUS, but the end, in words."""
    with raw_guest(tmp_path, init=init) as guest:
        size = len(guest.memory)
        guest.memory[:size] = bytes(size)
        os.ftruncate(guest.memory_fd, 0)
        guest.serve()
        os.ftruncate(guest.memory_fd, size)
        assert guest.used_idx == 0
        assert lost() == 1


def test_a_request_in_memory_that_is_cut_off_ends_the_session_and_is_not_served(
    tmp_path: Path, lost: Callable[[], int]
) -> None:
    (tmp_path / "f").touch()
    with raw_guest(tmp_path) as guest:
        served = guest.device.fs.requests
        before = guest.used_idx
        table = [Desc(GUEST + HEAP, 56, NEXT, 1), Desc(GUEST + REPLY, 120, WRITE)]
        guest.write_table(table)
        os.ftruncate(guest.memory_fd, HEAP)
        guest.offer(0)
        guest.serve()
        assert guest.used_idx == before
        assert guest.device.fs.requests == served
        assert lost() == 1
        assert not guest.device.fs.initialized
        os.ftruncate(guest.memory_fd, SIZE)


def test_a_reply_to_memory_that_is_cut_off_ends_the_session(tmp_path: Path, lost: Callable[[], int]) -> None:
    with raw_guest(tmp_path) as guest:
        message = getattr_message(5)
        before = guest.used_idx
        guest.write_table([Desc(GUEST + HEAP, len(message), NEXT, 1), Desc(GUEST + REPLY, 120, WRITE)])
        os.ftruncate(guest.memory_fd, REPLY)
        guest.memory[HEAP : HEAP + len(message)] = message
        guest.offer(0)
        guest.serve()
        assert guest.used_idx == before
        assert lost() == 1
        assert not guest.device.fs.initialized
        os.ftruncate(guest.memory_fd, SIZE)


def test_after_new_memory_the_guest_is_served_again(tmp_path: Path, lost: Callable[[], int]) -> None:
    with raw_guest(tmp_path, init=False) as guest:
        os.ftruncate(guest.memory_fd, 0)
        guest.serve()
        os.ftruncate(guest.memory_fd, SIZE)
        # It is not the guest's memory, whatever becomes of the file.
        guest.device.enable_ring(1, True)
        guest.serve()
        assert lost() == 2
        guest.device.reset()
        guest.device.set_memory([Region(GUEST, SIZE, USER, 0, os.dup(guest.memory_fd))])
        ring = Ring(QUEUE_SIZE, USER + DESC, USER + USED, USER + AVAIL, 0, os.dup(guest.kick), None, None)
        guest.device.start_ring(1, ring)
        guest.device.enable_ring(1, True)
        guest.initialize()


BUS_ADRERR, BUS_MCEERR_AR = 2, 4
SIGNALLED = f"""
import ctypes, mmap, os, re, struct, sys
from coherent_vfs.server.virtio.guest_memory import GuestMemory

code = int(sys.argv[1])
fd = os.memfd_create("guest")
os.truncate(fd, 1 << 20)
memory = GuestMemory()
memory.add({GUEST}, 1 << 20, {USER}, 0, fd)
start = next(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if "memfd:guest" in line)
info = ctypes.create_string_buffer(struct.pack("<iiiiQ", {int(signal.SIGBUS)}, 0, code, 0, start), 128)
rt_sigqueueinfo = 129 if os.uname().machine == "x86_64" else 138
assert ctypes.CDLL(None).syscall(rt_sigqueueinfo, os.getpid(), {int(signal.SIGBUS)}, info) == 0
print(memory.lost)
"""


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [(BUS_ADRERR, 0, b"True\n"), (BUS_MCEERR_AR, -signal.SIGBUS, b""), (0, -signal.SIGBUS, b"")],
    ids=["beyond the end", "hardware error", "kill(2)"],
)
def test_only_a_page_beyond_the_end_of_its_file_is_replaced(code: int, status: int, output: bytes) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(code)], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (status, output)


def test_an_operation_that_fails_as_nobody_expects_is_an_eio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("unexpected")

    expect_log("operation failed")
    with raw_guest(tmp_path, init=False) as guest:
        with monkeypatch.context() as patch:
            patch.setattr(file_system, "negotiate", fail)
            body = INIT_IN.pack(7, 41, 131072, 0, 0)
            assert guest.request(Opcode.INIT, 0, body) == (errno.EIO, b"")
        guest.initialize()
