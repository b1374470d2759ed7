"""The handler with the real device: what a front-end can do to it, and that nothing of it stays."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coherent_vfs.server.device.device import FsDevice
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.settings import Settings
from coherent_vfs.server.vhost_user.handler import PROTOCOL_FEATURES, WINDOW_FEATURES, Handler
from coherent_vfs.server.vhost_user.messages import (
    INVALID_FD,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    HeaderFlag,
    MemoryRegion,
    Message,
    Request,
    VringAddress,
    VringState,
    pack_memory_table,
    pack_single_region,
    pack_u64,
    pack_vring_address,
    pack_vring_state,
    unpack_u64,
    unpack_vring_state,
)
from tests.unit.server.fake_device import leaked, open_fds

BASE = 0x7F00_0000_0000
SIZE = 64
MEMORY = 0x20000
LOW = MemoryRegion(guest_addr=0, size=0x10000, user_addr=BASE, mmap_offset=0)
HIGH = MemoryRegion(guest_addr=0x10000, size=0x10000, user_addr=BASE + 0x10000, mmap_offset=0x10000)
AWAY = MemoryRegion(guest_addr=0x100000, size=0x10000, user_addr=BASE + 0x100000, mmap_offset=0)
AVAIL, USED = 0x400, 0x800
WINDOW = 2 << 20

ExpectLog = Callable[[str], None]


class Replies:
    """Takes the place of a connection."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def reply(self, message: Message, payload: bytes) -> None:
        self.payloads.append(payload)


class Bench:
    """A device on an empty share, its handler, and guest memory."""

    def __init__(self, share: Path) -> None:
        self.root = os.open(share, os.O_PATH)
        self.loop = EventLoop()
        settings = Settings(shared_dir=share, root_fd=self.root, num_request_queues=2, window_bytes=WINDOW)
        self.device = FsDevice(settings, self.loop)
        self.replies = Replies()
        self.handler = Handler(self.device, self.replies)  # type: ignore[arg-type]  # only reply() is used
        self.memory = os.memfd_create("guest")
        os.truncate(self.memory, MEMORY)

    def status(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        flags = VERSION | HeaderFlag.NEED_REPLY
        self.handler.handle(Message(request, flags, payload, [os.dup(fd) for fd in fds]))
        return unpack_u64(self.replies.payloads.pop())

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert self.status(request, payload, fds) == 0

    def start(self, index: int, kick: int, *, size: int = SIZE, at: int = BASE) -> int:
        """Set up and enable a ring; the acknowledgement of what starts it."""
        self.do(Request.SET_VRING_NUM, pack_vring_state(VringState(index, size)))
        self.do(Request.SET_VRING_BASE, pack_vring_state(VringState(index, 0)))
        self.do(Request.SET_VRING_ADDR, ring_address(index, at))
        self.do(Request.SET_VRING_ENABLE, pack_vring_state(VringState(index, 1)))
        return self.status(Request.SET_VRING_KICK, pack_u64(index), [kick])

    def base(self, index: int) -> int:
        self.handler.handle(Message(Request.GET_VRING_BASE, VERSION, pack_vring_state(VringState(index, 0))))
        return unpack_vring_state(self.replies.payloads.pop()).num

    def offer(self, head: int, idx: int) -> None:
        """Put a head and an index into the available ring of queue 0."""
        os.pwrite(self.memory, struct.pack("<HHH", 0, idx, head), AVAIL)

    def turn(self) -> None:
        """Let the loop go round once."""
        self.loop.call_later(0, self.loop.stop)
        self.loop.run()

    def close(self) -> None:
        self.device.close()
        os.close(self.memory)
        os.close(self.root)


def ring_address(index: int, at: int = BASE) -> bytes:
    start = at + index * 0x2000
    return pack_vring_address(VringAddress(index, desc=start, avail=start + AVAIL, used=start + USED))


@contextmanager
def benches(share: Path) -> Iterator[Bench]:
    """A bench whose front-end leaves at the end, and nothing with it."""
    bench = Bench(share)
    before = open_fds()
    try:
        yield bench
        bench.handler.close()
        assert not leaked(before)
    finally:
        bench.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benches(tmp_path) as bench:
        bench.do(Request.SET_FEATURES, pack_u64(VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES))
        yield bench


@pytest.fixture
def kick(bench: Bench) -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def ready(bench: Bench) -> Bench:
    bench.do(Request.SET_MEM_TABLE, pack_memory_table([LOW]), [bench.memory])
    return bench


def test_memory_slots(bench: Bench, kick: int, expect_log: ExpectLog) -> None:
    bench.do(Request.ADD_MEM_REG, pack_single_region(LOW), [bench.memory])
    expect_log("outside guest memory")
    assert bench.start(0, kick, at=HIGH.user_addr) == 0
    bench.do(Request.ADD_MEM_REG, pack_single_region(HIGH), [bench.memory])
    assert bench.start(1, kick) == 0
    for _ in range(3):
        bench.do(Request.ADD_MEM_REG, pack_single_region(AWAY), [bench.memory])
        bench.turn()
        bench.do(Request.REM_MEM_REG, pack_single_region(AWAY), [bench.memory])
    expect_log("no memory region")
    assert bench.status(Request.REM_MEM_REG, pack_single_region(AWAY)) == 1


def test_memory_that_cannot_be_mapped(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    expect_log("past the end of its file")
    past = MemoryRegion(0x10000, 0x20000, BASE + 0x10000, 0x10000)
    assert ready.status(Request.ADD_MEM_REG, pack_single_region(past), [ready.memory]) == 1
    table = pack_memory_table([AWAY, past])
    assert ready.status(Request.SET_MEM_TABLE, table, [ready.memory, ready.memory]) == 1
    expect_log("cannot be mapped")
    assert ready.status(Request.ADD_MEM_REG, pack_single_region(HIGH), [kick]) == 1
    expect_log("is not possible")
    beyond = MemoryRegion(0x10000, 0x10000, BASE + 0x10000, 1 << 63)
    assert ready.status(Request.ADD_MEM_REG, pack_single_region(beyond), [kick]) == 1
    assert ready.start(0, kick) == 0, "the old memory is still there"


def test_same_memory_again_under_a_running_ring(ready: Bench, kick: int) -> None:
    assert ready.start(0, kick) == 0
    for _ in range(3):
        ready.do(Request.SET_MEM_TABLE, pack_memory_table([LOW, HIGH]), [ready.memory] * 2)
        os.eventfd_write(kick, 1)
        ready.turn()
    assert ready.base(0) == 0


def test_kicks_by_a_pipe_until_its_end(ready: Bench) -> None:
    kick, kicker = os.pipe()
    assert ready.start(1, kick, at=BASE - 0x2000) == 0  # where offer() writes
    for served in range(1, 4):
        ready.offer(0, served)
        os.write(kicker, bytes(8))
        ready.turn()
        assert struct.unpack("<H", os.pread(ready.memory, 2, USED + 2)) == (served,)
    os.close(kicker)
    ready.turn()
    before = time.thread_time()
    ready.loop.call_later(0.2, ready.loop.stop)
    ready.loop.run()
    assert time.thread_time() - before < 0.1, "waits, and does not spin"
    assert ready.base(1) == 3
    os.close(kick)


def test_memory_taken_away_from_a_running_ring(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    assert ready.start(0, kick) == 0
    expect_log("lies outside the guest's memory")
    expect_log("broke the ring")
    ready.do(Request.SET_MEM_TABLE, pack_memory_table([AWAY]), [ready.memory])
    ready.do(Request.SET_VRING_ENABLE, pack_vring_state(VringState(0, 1)))
    os.eventfd_write(kick, 1)
    ready.turn()
    assert ready.base(0) == 0
    ready.do(Request.SET_MEM_TABLE, pack_memory_table([LOW]), [ready.memory])
    assert ready.start(0, kick) == 0
    ready.turn()


def test_too_large_a_ring(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    expect_log("over --queue-size")
    assert ready.start(0, kick, size=2048) == 1


def test_kick_that_cannot_be_waited_on(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    expect_log("Operation not permitted")
    assert ready.start(0, ready.memory) == 1
    assert ready.start(0, kick) == 0
    ready.turn()


def test_polled_ring(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    assert ready.start(0, kick) == 0
    ready.do(Request.SET_VRING_KICK, pack_u64(INVALID_FD))
    expect_log("broke the ring of queue 0")
    ready.offer(head=SIZE, idx=1)
    ready.turn()


def test_pipe_that_is_not_emptied(ready: Bench, kick: int) -> None:
    assert ready.start(0, kick) == 0
    read, write = os.pipe()
    for _ in range(10_000):
        ready.do(Request.SET_VRING_CALL, pack_u64(0), [write])  # interrupts once each time
    os.close(read)
    os.close(write)


def test_shared_memory_ends_with_reset_and_session(ready: Bench, expect_log: ExpectLog) -> None:
    told: list[object] = []
    ready.device.shared_memory.on_reset = lambda: told.append("reset")
    ready.do(Request.SET_PROTOCOL_FEATURES, pack_u64(PROTOCOL_FEATURES | WINDOW_FEATURES))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ready.do(Request.SET_BACKEND_REQ_FD, fds=[ours.fileno()])
        for _ in range(2):
            ready.device.shared_memory.map(ready.memory, 0, 0, 4096, True, told.append)
            ready.do(Request.RESET_DEVICE)
        assert told == ["reset", errno.ECONNRESET] * 2
        expect_log("Socket operation on non-socket")
        assert ready.status(Request.SET_BACKEND_REQ_FD, fds=[ready.memory]) == 1
        assert ready.device.shared_memory.connected
        ready.handler.close()
        assert not ready.device.shared_memory.connected
        assert told[4:] == ["reset"]


def test_mappings_are_asked_for_while_all_rings_run(ready: Bench, kick: int) -> None:
    """QEMU 11.1 dies of it otherwise."""
    ready.do(Request.SET_PROTOCOL_FEATURES, pack_u64(PROTOCOL_FEATURES | WINDOW_FEATURES))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def asked() -> bool:
        ready.device.shared_memory.unmap(0, 4096, lambda error: None)
        try:
            return bool(theirs.recv(1 << 16))
        except BlockingIOError:
            return False

    def enable(index: int, enabled: int) -> None:
        ready.do(Request.SET_VRING_ENABLE, pack_vring_state(VringState(index, enabled)))

    with ours, theirs:
        ready.do(Request.SET_BACKEND_REQ_FD, fds=[ours.fileno()])
        assert not asked(), "the driver is not there yet"
        ready.start(0, kick)
        ready.start(1, kick)
        assert asked()
        for index in (1, 0):
            enable(index, 0)
            assert not asked()
        for index in (0, 1):
            assert not asked()
            enable(index, 1)
        assert asked()
        ready.base(0)
        assert not asked()
        ready.start(0, kick)
        assert asked()
        ready.do(Request.RESET_DEVICE)
        assert not asked()


def test_error_descriptor(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    error = os.eventfd(0, os.EFD_NONBLOCK)
    ready.do(Request.SET_VRING_ERR, pack_u64(0), [error])
    assert ready.start(0, kick) == 0
    expect_log("broke the ring of queue 0")
    ready.offer(head=SIZE, idx=1)
    os.eventfd_write(kick, 1)
    ready.turn()
    assert os.eventfd_read(error) == 1
    os.close(error)


def test_error_descriptor_that_cannot_be_written(ready: Bench, kick: int, expect_log: ExpectLog) -> None:
    unwritable = os.open("/dev/null", os.O_RDONLY)
    ready.do(Request.SET_VRING_ERR, pack_u64(0), [unwritable])
    os.close(unwritable)
    assert ready.start(0, kick) == 0
    expect_log("broke the ring of queue 0")
    ready.offer(head=SIZE, idx=1)
    os.eventfd_write(kick, 1)
    ready.turn()


# Anything at all

Said = tuple[int, bytes, list[str]]
"""A request, its payload, and which descriptors come with it."""

rings = st.integers(0, 2)
regions = st.sampled_from([LOW, HIGH])
tables = st.sampled_from([[LOW], [LOW], [LOW, HIGH], [AWAY], []])
fds = st.sampled_from(["eventfd", "eventfd", "eventfd", "pipe", "closed pipe", "memory", "null"])
features = st.sampled_from(
    [
        VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES,
        VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX,
    ]
)


def on_ring(request: Request, nums: Sequence[int]) -> st.SearchStrategy[Said]:
    return st.builds(lambda i, n: (request, pack_vring_state(VringState(i, n)), []), rings, st.sampled_from(nums))


def with_fd(request: Request) -> st.SearchStrategy[Said]:
    return st.builds(lambda i, fd: (request, pack_u64(i), [fd]), rings, fds)


requests: st.SearchStrategy[Said] = st.one_of(
    st.builds(lambda t: (Request.SET_MEM_TABLE, pack_memory_table(t), ["memory"] * len(t)), tables),
    st.builds(lambda r, fd: (Request.ADD_MEM_REG, pack_single_region(r), [fd]), regions, fds),
    st.builds(lambda r: (Request.REM_MEM_REG, pack_single_region(r), []), regions),
    st.builds(lambda f: (Request.SET_FEATURES, pack_u64(f), []), features),
    on_ring(Request.SET_VRING_NUM, [SIZE, SIZE // 2]),
    on_ring(Request.SET_VRING_BASE, [0, 5, 0xFFFF]),
    on_ring(Request.SET_VRING_ENABLE, [1, 1, 0]),
    on_ring(Request.GET_VRING_BASE, [0]),
    st.builds(lambda i: (Request.SET_VRING_ADDR, ring_address(i), []), rings),
    st.builds(lambda i: (Request.SET_VRING_ADDR, ring_address(i, HIGH.user_addr), []), rings),
    with_fd(Request.SET_VRING_KICK),
    with_fd(Request.SET_VRING_KICK),
    with_fd(Request.SET_VRING_CALL),
    with_fd(Request.SET_VRING_ERR),
    st.builds(lambda i: (Request.SET_VRING_KICK, pack_u64(i | INVALID_FD), []), rings),
    st.sampled_from([(Request.RESET_DEVICE, b"", []), (Request.RESET_OWNER, b"", [])]),
)
ring_starts = st.sampled_from([0, 0x2000, 0x4000, 0x10000])
stores = st.tuples(
    st.builds(lambda start, part: start + part, ring_starts, st.sampled_from([0, AVAIL, USED])),
    st.one_of(st.binary(max_size=64), st.builds(lambda n: struct.pack("<HHH", 0, n, 0), st.integers(0, 7))),
)
"""An offset in guest memory and what the guest writes there."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(requests, st.none() | stores), max_size=50))
def test_random_sequences(tmp_path: Path, steps: list[tuple[Said, tuple[int, bytes] | None]]) -> None:
    """Whatever the front-end says and the guest stores: the device goes on, and nothing stays open."""
    pipe, closed = os.pipe(), os.pipe()
    os.close(closed[0])
    sources = {
        "eventfd": os.eventfd(1),
        "pipe": pipe[1],
        "closed pipe": closed[1],
        "null": os.open("/dev/null", os.O_RDONLY),
    }
    logging.disable(logging.CRITICAL)
    try:
        with benches(tmp_path) as bench:
            available = sources | {"memory": bench.memory}
            for (request, payload, names), store in steps:
                copies = [os.dup(available[name]) for name in names]
                bench.handler.handle(Message(request, VERSION | HeaderFlag.NEED_REPLY, payload, copies))
                if store is not None:
                    os.pwrite(bench.memory, store[1], store[0])
                bench.turn()
    finally:
        logging.disable(logging.NOTSET)
        for fd in {*sources.values(), *pipe}:
            os.close(fd)
