"""What a front-end may ask, in any order, and what the device is told."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coherent_vfs.server.vhost_user.connection import Connection
from coherent_vfs.server.vhost_user.handler import PROTOCOL_FEATURES, WINDOW_FEATURES, Handler
from coherent_vfs.server.vhost_user.messages import (
    INVALID_FD,
    VERSION,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    Config,
    HeaderFlag,
    MemoryRegion,
    Message,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
    pack_config,
    pack_memory_table,
    pack_single_region,
    pack_u64,
    pack_vring_address,
    pack_vring_state,
    unpack_config,
    unpack_shmem_config,
    unpack_u64,
    unpack_vring_state,
)
from coherent_vfs.server.virtio.guest_memory import MAX_REGIONS
from tests.unit.server.fake_device import FakeDevice, leaked, open_fds

BASE = 0x7F00_0000_0000
REGION = MemoryRegion(guest_addr=0, size=0x10000, user_addr=BASE, mmap_offset=0)
HIGH = MemoryRegion(guest_addr=0x10000, size=0x10000, user_addr=BASE + 0x10000, mmap_offset=0x10000)
SIZE = 64
WINDOW = 1 << 30
SHMEM = PROTOCOL_FEATURES | WINDOW_FEATURES
ALL = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES

ExpectLog = Callable[[str], None]


class Bench:
    """A handler with a fake device, and the socket at which its replies arrive."""

    def __init__(self, window_bytes: int = 0) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.device = FakeDevice(window_bytes)
        self.connection = Connection(ours, send_timeout=0.05)
        self.handler = Handler(self.device, self.connection)

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, need_reply: bool = False
    ) -> bytes | None:
        """Give the handler one message, with copies of `fds`; the payload of its reply, if it sent one."""
        flags = VERSION | (HeaderFlag.NEED_REPLY if need_reply else 0)
        self.handler.handle(Message(request, flags, payload, [os.dup(fd) for fd in fds]))
        try:
            reply = self.peer.recv(8192)
        except BlockingIOError:
            return None
        got, flags, size = struct.unpack_from("=III", reply)
        assert (got, flags, size) == (request, VERSION | HeaderFlag.REPLY, len(reply) - 12)
        return reply[12:]

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        reply = self.send(request, payload)
        assert reply is not None
        return reply

    def status(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The acknowledgement: 0 for done."""
        reply = self.send(request, payload, fds, need_reply=True)
        assert reply is not None
        return unpack_u64(reply)

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert self.status(request, payload, fds) == 0

    def refuse(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert self.status(request, payload, fds) == 1

    def negotiate(self, features: int = ALL) -> None:
        self.do(Request.SET_FEATURES, pack_u64(features))

    def set_ring(self, request: int, index: int, num: int) -> None:
        self.do(request, pack_vring_state(VringState(index, num)))

    def get_base(self, index: int) -> int:
        state = unpack_vring_state(self.ask(Request.GET_VRING_BASE, pack_vring_state(VringState(index, 0))))
        assert state.index == index
        return state.num

    def start(self, index: int, base: int = 0) -> None:
        """Set up a ring as QEMU does, memory being there."""
        self.set_ring(Request.SET_VRING_NUM, index, SIZE)
        self.set_ring(Request.SET_VRING_BASE, index, base)
        self.do(Request.SET_VRING_ADDR, ring_address(index))
        self.do(Request.SET_VRING_KICK, pack_u64(index), [0])
        self.do(Request.SET_VRING_CALL, pack_u64(index), [0])

    def close(self) -> None:
        self.handler.close()
        self.connection.close()
        self.peer.close()


def ring_address(index: int, at: int = BASE) -> bytes:
    start = at + index * 0x2000
    return pack_vring_address(VringAddress(index, desc=start, avail=start + 0x400, used=start + 0x800))


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = open_fds()
    bench = Bench()
    yield bench
    bench.close()
    assert not bench.device.rings
    assert not leaked(before)


@pytest.fixture
def windowed() -> Iterator[Bench]:
    """With a device that has a DAX window, negotiated."""
    before = open_fds()
    bench = Bench(WINDOW)
    bench.do(Request.SET_PROTOCOL_FEATURES, pack_u64(PROTOCOL_FEATURES | WINDOW_FEATURES))
    yield bench
    bench.close()
    assert not leaked(before)


@pytest.fixture
def ready(bench: Bench) -> Bench:
    """Negotiated, memory set."""
    bench.negotiate()
    bench.do(Request.SET_PROTOCOL_FEATURES, pack_u64(PROTOCOL_FEATURES))
    bench.do(Request.SET_MEM_TABLE, pack_memory_table([REGION]), [0])
    return bench


# Features and the session


def test_features(bench: Bench) -> None:
    offered = unpack_u64(bench.ask(Request.GET_FEATURES))
    assert offered == bench.device.features | VHOST_USER_F_PROTOCOL_FEATURES
    bench.negotiate(offered)
    assert bench.device.accepted == bench.device.features
    assert bench.handler.features == offered


def test_features_not_offered(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("features 0x4000000 were not offered")
    bench.refuse(Request.SET_FEATURES, pack_u64(1 << 26))
    assert bench.device.accepted is None


def test_protocol_features(bench: Bench, expect_log: ExpectLog) -> None:
    offered = ProtocolFeature(unpack_u64(bench.ask(Request.GET_PROTOCOL_FEATURES)))
    assert ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.CONFIG in offered
    assert ProtocolFeature.STATUS not in offered
    bench.do(Request.SET_PROTOCOL_FEATURES, pack_u64(offered))
    expect_log("were not offered")
    bench.refuse(Request.SET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.INBAND_NOTIFICATIONS))
    assert bench.handler.protocol_features == offered


def test_counts(bench: Bench) -> None:
    assert unpack_u64(bench.ask(Request.GET_QUEUE_NUM)) == 3
    assert unpack_u64(bench.ask(Request.GET_MAX_MEM_SLOTS)) == MAX_REGIONS


def test_no_reply_unless_asked(bench: Bench, expect_log: ExpectLog) -> None:
    assert bench.send(Request.SET_OWNER) is None
    expect_log("no ring 9")
    assert bench.send(Request.SET_VRING_NUM, pack_vring_state(VringState(9, 64))) is None


@pytest.mark.parametrize("request_number", [0, 6, 7, 19, 31, 39, 40, 44, 4711])
def test_unsupported_requests(bench: Bench, caplog: pytest.LogCaptureFixture, request_number: int) -> None:
    with caplog.at_level(logging.INFO):
        assert bench.send(request_number, b"12345678", [0]) is None
    assert "not supported" in caplog.text
    bench.refuse(request_number, b"12345678", [0])


def test_reply_has_a_body_also_when_an_acknowledgement_is_asked_for(ready: Bench) -> None:
    reply = ready.send(Request.GET_QUEUE_NUM, need_reply=True)
    assert reply == pack_u64(3)


# The DAX window


def test_window_is_offered_where_there_is_one(bench: Bench, windowed: Bench, expect_log: ExpectLog) -> None:
    for device, offered in ((bench, PROTOCOL_FEATURES), (windowed, PROTOCOL_FEATURES | WINDOW_FEATURES)):
        assert unpack_u64(device.ask(Request.GET_PROTOCOL_FEATURES)) == offered
    assert ProtocolFeature.SHMEM | ProtocolFeature.BACKEND_SEND_FD in WINDOW_FEATURES
    assert unpack_shmem_config(windowed.ask(Request.GET_SHMEM_CONFIG)) == [WINDOW]
    expect_log("were not offered")
    bench.refuse(Request.SET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.SHMEM))


def test_backend_channel_goes_to_the_device(windowed: Bench, expect_log: ExpectLog) -> None:
    for fd in (0, 1):
        windowed.do(Request.SET_BACKEND_REQ_FD, fds=[fd])
        channel = windowed.device.backend_channel
        assert channel is not None
        assert os.fstat(channel).st_ino == os.fstat(fd).st_ino
    expect_log("0 file descriptors came, 1 expected")
    windowed.refuse(Request.SET_BACKEND_REQ_FD)
    assert windowed.device.backend_channel == channel
    windowed.device.refuse = OSError
    expect_log("no")
    windowed.refuse(Request.SET_BACKEND_REQ_FD, fds=[0])
    windowed.device.refuse = None
    windowed.do(Request.RESET_DEVICE)
    assert windowed.device.backend_channel == channel
    windowed.handler.close()
    assert windowed.device.backend_channel is None


def test_backend_channel_of_a_front_end_without_shared_memory(windowed: Bench) -> None:
    windowed.do(Request.SET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.BACKEND_REQ))
    for fd in (0, 1):
        windowed.do(Request.SET_BACKEND_REQ_FD, fds=[fd])
        channel = windowed.handler.backend_channel
        assert channel is not None
        assert os.fstat(channel).st_ino == os.fstat(fd).st_ino
    assert windowed.device.backend_channel is None


# Configuration space


def test_config_byte_by_byte_as_user_mode_linux_reads_it(bench: Bench) -> None:
    for size in range(1, 45):
        reply = unpack_config(bench.ask(Request.GET_CONFIG, pack_config(Config(0, bytes(size)))))
        assert reply == Config(0, bench.device.config[:size])


def test_config_in_the_middle_and_beyond_the_end(bench: Bench) -> None:
    reply = unpack_config(bench.ask(Request.GET_CONFIG, pack_config(Config(36, bytes(20), 1))))
    assert reply == Config(36, struct.pack("<II12x", 2, 0), 1)
    reply = unpack_config(bench.ask(Request.GET_CONFIG, pack_config(Config(2**32 - 1, bytes(4)))))
    assert reply.data == bytes(4)


def test_config_error_is_an_empty_reply(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("configuration access")
    assert bench.ask(Request.GET_CONFIG, struct.pack("=III", 0, 100, 0) + b"short") == b""


def test_config_is_read_only(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("read-only")
    bench.refuse(Request.SET_CONFIG, pack_config(Config(0, b"other")))


# Guest memory


def test_memory_table(bench: Bench) -> None:
    bench.do(Request.SET_MEM_TABLE, pack_memory_table([REGION, HIGH]), [0, 0])
    assert [region[0] for region in bench.device.memory] == [0, 0x10000]
    bench.do(Request.SET_MEM_TABLE, pack_memory_table([HIGH]), [0])
    assert bench.device.memory == [(0x10000, 0x10000, BASE + 0x10000, 0x10000)]


def test_memory_table_of_user_mode_linux(bench: Bench) -> None:
    """One region in a payload of 72 bytes, with guest address, user address and offset all the same."""
    region = MemoryRegion(0x60000000, 0x4000000, 0x60000000, 0x60000000)
    payload = pack_memory_table([region]).ljust(72, b"\0")
    bench.do(Request.SET_MEM_TABLE, payload, [0])
    assert bench.device.memory == [(0x60000000, 0x4000000, 0x60000000, 0x60000000)]


@pytest.mark.parametrize(
    ("table", "fds"),
    [
        ([REGION, HIGH], 1),
        ([REGION], 2),
        ([REGION, REGION], 2),
        ([REGION, MemoryRegion(0xF000, 0x1000, BASE + 0x20000, 0)], 2),
        ([REGION, MemoryRegion(0x20000, 0x1000, BASE + 0xF000, 0)], 2),
        ([MemoryRegion(0, 0, BASE, 0)], 1),
        ([MemoryRegion(2**64 - 0x1000, 0x1001, BASE, 0)], 1),
        ([MemoryRegion(0, 0x1001, 2**64 - 0x1000, 0)], 1),
        ([MemoryRegion(0, 0x1001, BASE, 2**64 - 0x1000)], 1),
    ],
)
def test_bad_memory_table_leaves_the_old_one(
    ready: Bench, expect_log: ExpectLog, table: list[MemoryRegion], fds: int
) -> None:
    expect_log("SET_MEM_TABLE")
    before = list(ready.device.memory)
    ready.refuse(Request.SET_MEM_TABLE, pack_memory_table(table), [0] * fds)
    assert ready.device.memory == before


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_memory_that_the_device_cannot_map(bench: Bench, expect_log: ExpectLog, error: type[Exception]) -> None:
    expect_log("vhost-user request failed")
    bench.device.refuse = error
    bench.refuse(Request.SET_MEM_TABLE, pack_memory_table([REGION]), [0])
    bench.refuse(Request.ADD_MEM_REG, pack_single_region(REGION), [0])
    bench.device.refuse = None
    bench.do(Request.ADD_MEM_REG, pack_single_region(REGION), [0])


@pytest.mark.parametrize("fds", [[], [0]])
def test_memory_slots(bench: Bench, expect_log: ExpectLog, fds: list[int]) -> None:
    bench.do(Request.ADD_MEM_REG, pack_single_region(REGION), [0])
    bench.do(Request.ADD_MEM_REG, pack_single_region(HIGH), [0])
    assert len(bench.device.memory) == 2
    expect_log("overlaps")
    bench.refuse(Request.ADD_MEM_REG, pack_single_region(HIGH), [0])
    other_offset = MemoryRegion(HIGH.guest_addr, HIGH.size, HIGH.user_addr, mmap_offset=0)
    bench.do(Request.REM_MEM_REG, pack_single_region(other_offset), fds)
    expect_log("no region at 0x10000")
    bench.refuse(Request.REM_MEM_REG, pack_single_region(HIGH), fds)
    bench.do(Request.ADD_MEM_REG, pack_single_region(HIGH), [0])


# Rings


def test_a_ring_as_qemu_sets_it_up(ready: Bench) -> None:
    ready.start(1, base=7)
    ring = ready.device.rings[1]
    assert (ring.size, ring.base, ring.desc, ring.avail, ring.used) == (
        SIZE,
        7,
        BASE + 0x2000,
        BASE + 0x2400,
        BASE + 0x2800,
    )
    assert ring.kick is not None
    assert ready.device.enabled == {1: False}
    ready.set_ring(Request.SET_VRING_ENABLE, 1, 1)
    assert ready.device.enabled == {1: True}
    ready.set_ring(Request.SET_VRING_ENABLE, 1, 0)
    assert ready.device.enabled == {1: False}


STEPS: dict[str, Callable[[Bench], None]] = {
    "memory": lambda b: b.do(Request.SET_MEM_TABLE, pack_memory_table([REGION]), [0]),
    "num": lambda b: b.set_ring(Request.SET_VRING_NUM, 0, SIZE),
    "base": lambda b: b.set_ring(Request.SET_VRING_BASE, 0, 5),
    "addr": lambda b: b.do(Request.SET_VRING_ADDR, ring_address(0)),
    "kick": lambda b: b.do(Request.SET_VRING_KICK, pack_u64(0), [0]),
    "call": lambda b: b.do(Request.SET_VRING_CALL, pack_u64(0), [0]),
    "enable": lambda b: b.set_ring(Request.SET_VRING_ENABLE, 0, 1),
}


def test_every_order_of_set_up() -> None:
    needed = {"memory", "num", "addr", "kick"}
    for order in itertools.permutations(STEPS):
        bench = Bench()
        bench.negotiate()
        done: set[str] = set()
        for step in order:
            # A new base for a ring that runs is a new beginning, and needs a new kick.
            restarts = step == "base" and needed <= done
            STEPS[step](bench)
            done.add(step)
            assert (0 in bench.device.rings) == (needed <= done and not restarts), (order, step)
            if restarts:
                STEPS["kick"](bench)
        assert bench.device.rings[0].base == 5, order
        assert bench.device.enabled[0], order
        assert bench.device.calls[0] is not None, order
        bench.close()


def test_rings_are_enabled_from_the_start_without_protocol_features(bench: Bench) -> None:
    bench.do(Request.SET_MEM_TABLE, pack_memory_table([REGION]), [0])
    bench.start(0)
    assert bench.device.enabled == {0: False}
    bench.negotiate(VIRTIO_F_VERSION_1)
    bench.start(1)
    assert bench.device.enabled == {0: True, 1: True}


def test_features_leave_rings_alone_with_protocol_features(ready: Bench) -> None:
    ready.start(0)
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ready.negotiate()
    assert ready.device.enabled == {0: True}


def test_polled_rings(ready: Bench) -> None:
    ready.set_ring(Request.SET_VRING_NUM, 0, SIZE)
    ready.do(Request.SET_VRING_ADDR, ring_address(0))
    ready.do(Request.SET_VRING_CALL, pack_u64(INVALID_FD))
    ready.do(Request.SET_VRING_ERR, pack_u64(INVALID_FD))
    ready.do(Request.SET_VRING_KICK, pack_u64(INVALID_FD))
    ring = ready.device.rings[0]
    assert (ring.kick, ring.call, ring.err) == (None, None, None)


def test_call_replaced_while_the_ring_runs(ready: Bench) -> None:
    ready.start(0)
    ready.do(Request.SET_VRING_CALL, pack_u64(0), [1])
    call = ready.device.calls[0]
    assert call is not None
    assert os.fstat(call).st_ino == os.fstat(1).st_ino
    ready.do(Request.SET_VRING_CALL, pack_u64(INVALID_FD))
    assert ready.device.calls[0] is None


def test_ring_descriptors_do_not_block(ready: Bench) -> None:
    """User-Mode Linux gives a pipe; a guest that never empties it must not stop us."""
    read, write = os.pipe()
    ready.do(Request.SET_VRING_CALL, pack_u64(0), [write])
    ready.start(0)
    ready.do(Request.SET_VRING_CALL, pack_u64(0), [write])
    call = ready.device.calls[0]
    assert call is not None
    assert not os.get_blocking(call)
    os.close(read)
    os.close(write)


def test_kick_replaced_while_the_ring_runs(ready: Bench) -> None:
    ready.start(0)
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ready.device.consumed = 3
    ready.do(Request.SET_VRING_KICK, pack_u64(0), [1])
    ring = ready.device.rings[0]
    assert ring.kick is not None
    assert os.fstat(ring.kick).st_ino == os.fstat(1).st_ino
    assert ring.base == 3
    assert ready.device.calls[0] is not None
    assert ready.device.enabled[0]


def test_stop_and_start_again(ready: Bench) -> None:
    ready.start(0, base=0xFFFE)
    ready.device.consumed = 5
    assert ready.get_base(0) == 3
    assert not ready.device.rings
    assert ready.get_base(0) == 3
    ready.do(Request.SET_VRING_KICK, pack_u64(0), [0])
    assert ready.device.rings[0].base == 3
    assert ready.get_base(0) == 8
    ready.start(0, base=1)
    assert ready.device.rings[0].base == 1


def test_base_of_a_ring_that_never_ran(ready: Bench) -> None:
    assert ready.get_base(2) == 0
    ready.set_ring(Request.SET_VRING_BASE, 2, 11)
    assert ready.get_base(2) == 11


def test_driver_bound_again_without_stopping_as_user_mode_linux_does(ready: Bench) -> None:
    ready.start(0)
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ready.device.consumed = 40
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 0)
    ready.do(Request.SET_VRING_CALL, pack_u64(0), [0])
    ready.set_ring(Request.SET_VRING_NUM, 0, 2 * SIZE)
    assert not ready.device.rings
    ready.set_ring(Request.SET_VRING_BASE, 0, 0)
    ready.do(Request.SET_VRING_ADDR, ring_address(0, BASE + 0x8000))
    ready.do(Request.SET_VRING_KICK, pack_u64(0), [0])
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ring = ready.device.rings[0]
    assert (ring.base, ring.size, ring.desc) == (0, 2 * SIZE, BASE + 0x8000)
    assert ready.device.calls[0] is not None
    assert ready.device.enabled[0]


def test_same_description_again_does_not_disturb_a_ring(ready: Bench) -> None:
    ready.start(0)
    ring = ready.device.rings[0]
    ready.set_ring(Request.SET_VRING_NUM, 0, SIZE)
    ready.do(Request.SET_VRING_ADDR, ring_address(0))
    ready.do(Request.SET_MEM_TABLE, pack_memory_table([REGION]), [0])
    assert ready.device.rings[0] is ring


def test_ring_waits_for_its_memory(bench: Bench, expect_log: ExpectLog) -> None:
    bench.do(Request.ADD_MEM_REG, pack_single_region(REGION), [0])
    bench.set_ring(Request.SET_VRING_NUM, 0, SIZE)
    bench.do(Request.SET_VRING_ADDR, ring_address(0, HIGH.user_addr))
    expect_log("outside guest memory")
    bench.do(Request.SET_VRING_KICK, pack_u64(0), [0])
    assert not bench.device.rings
    bench.do(Request.ADD_MEM_REG, pack_single_region(HIGH), [0])
    assert 0 in bench.device.rings


def test_ring_may_end_with_the_memory_but_not_later(ready: Bench, expect_log: ExpectLog) -> None:
    end = REGION.user_addr + REGION.size
    used_size = 6 + 8 * SIZE
    for used, fits in ((end - used_size - 2, True), (end - used_size + 2, False)):
        ready.set_ring(Request.SET_VRING_NUM, 0, SIZE)
        address = VringAddress(0, desc=BASE, avail=BASE + 0x400, used=used)
        ready.do(Request.SET_VRING_ADDR, pack_vring_address(address))
        if not fits:
            expect_log("outside guest memory")
        ready.do(Request.SET_VRING_KICK, pack_u64(0), [0])
        assert (0 in ready.device.rings) == fits


def test_ring_that_the_device_cannot_start(ready: Bench, expect_log: ExpectLog) -> None:
    expect_log("vhost-user request failed")
    ready.set_ring(Request.SET_VRING_NUM, 0, SIZE)
    ready.do(Request.SET_VRING_ADDR, ring_address(0))
    ready.device.refuse = ValueError
    ready.refuse(Request.SET_VRING_KICK, pack_u64(0), [0])
    ready.set_ring(Request.SET_VRING_NUM, 0, SIZE)
    ready.device.refuse = None
    ready.do(Request.SET_VRING_KICK, pack_u64(0), [0])
    assert 0 in ready.device.rings


@pytest.mark.parametrize(
    ("request_number", "payload", "fds"),
    [
        (Request.SET_VRING_NUM, pack_vring_state(VringState(3, 64)), 0),
        (Request.SET_VRING_NUM, pack_vring_state(VringState(0, 0)), 0),
        (Request.SET_VRING_NUM, pack_vring_state(VringState(0, 100)), 0),
        (Request.SET_VRING_NUM, pack_vring_state(VringState(0, 65536)), 0),
        (Request.SET_VRING_NUM, b"123", 0),
        (Request.SET_VRING_BASE, pack_vring_state(VringState(0, 65536)), 0),
        (Request.SET_VRING_ENABLE, pack_vring_state(VringState(0, 2)), 0),
        (Request.SET_VRING_ENABLE, pack_vring_state(VringState(2**32 - 1, 1)), 0),
        (Request.SET_VRING_ADDR, pack_vring_address(VringAddress(0, 8, 0, 0)), 0),
        (Request.SET_VRING_ADDR, pack_vring_address(VringAddress(0, 0, 2, 0)), 0),
        (Request.SET_VRING_ADDR, pack_vring_address(VringAddress(0, 0, 0, 1)), 0),
        (Request.SET_VRING_ADDR, pack_vring_address(VringAddress(0, 0, 0, 0, flags=1)), 0),
        (Request.SET_VRING_KICK, pack_u64(0), 0),
        (Request.SET_VRING_KICK, pack_u64(0), 2),
        (Request.SET_VRING_KICK, pack_u64(INVALID_FD), 1),
        (Request.SET_VRING_CALL, pack_u64(3), 1),
        (Request.SET_VRING_ERR, pack_u64(255), 1),
    ],
)
def test_bad_ring_requests_are_refused(
    ready: Bench, expect_log: ExpectLog, request_number: Request, payload: bytes, fds: int
) -> None:
    expect_log(request_number.name)
    ready.refuse(request_number, payload, [0] * fds)


def test_base_of_no_ring_cannot_be_answered(ready: Bench, expect_log: ExpectLog) -> None:
    expect_log("no ring 3")
    with pytest.raises(ProtocolError, match="GET_VRING_BASE cannot be answered"):
        ready.send(Request.GET_VRING_BASE, pack_vring_state(VringState(3, 0)))


def test_front_end_that_does_not_read_its_replies(bench: Bench) -> None:
    def flood() -> None:
        for _ in range(100_000):
            bench.handler.handle(Message(Request.GET_FEATURES, VERSION))

    with pytest.raises(ProtocolError, match="does not read"):
        flood()


# Ends


def test_reset_owner_only_disables(ready: Bench) -> None:
    ready.start(0)
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ready.do(Request.RESET_OWNER)
    assert ready.device.enabled == {0: False}
    assert ready.device.resets == 0


def test_reset_device_and_begin_again(ready: Bench) -> None:
    ready.start(0, base=9)
    ready.set_ring(Request.SET_VRING_ENABLE, 0, 1)
    ready.do(Request.RESET_DEVICE)
    assert ready.device.resets == 1
    assert not ready.device.rings
    assert ready.device.memory, "a front-end with memory slots does not send them again"
    assert ready.get_base(0) == 0
    ready.start(0)
    assert ready.device.enabled == {0: False}


def test_close_drops_everything(ready: Bench) -> None:
    ready.start(0)
    ready.do(Request.SET_VRING_ERR, pack_u64(0), [0])
    ready.do(Request.SET_VRING_KICK, pack_u64(1), [0])
    ready.do(Request.SET_BACKEND_REQ_FD, fds=[0])
    ready.handler.close()
    assert (ready.device.rings, ready.device.memory, ready.device.resets) == ({}, [], 1)
    assert ready.handler.backend_channel is None


# Anything at all

small = st.integers(0, 4)
numbers = st.one_of(small, st.sampled_from([SIZE, 2 * SIZE, 0xFFFF, 0x10000, 2**32 - 1]))
addresses = st.sampled_from([0, BASE, BASE + 0x400, BASE + 0x800, BASE + 0xFFF0, BASE + 0x10400, 2**64 - 16])
some_regions = st.one_of(
    st.sampled_from([REGION, HIGH]),
    st.builds(MemoryRegion, addresses, st.sampled_from([0, 0x1000, 2**64 - 1]), addresses, addresses),
)
payloads = st.one_of(
    st.builds(pack_vring_state, st.builds(VringState, small, numbers)),
    st.builds(pack_vring_address, st.builds(VringAddress, small, addresses, addresses, addresses)),
    st.builds(ring_address, small),
    st.builds(
        pack_u64, st.one_of(small, st.sampled_from([INVALID_FD, INVALID_FD | 1, ALL, VIRTIO_F_VERSION_1, SHMEM]))
    ),
    st.builds(pack_memory_table, st.lists(some_regions, max_size=3)),
    st.builds(pack_single_region, some_regions),
    st.builds(pack_config, st.builds(Config, numbers, st.binary(max_size=60))),
    st.binary(max_size=64),
)
any_message = st.tuples(
    st.one_of(st.sampled_from(list(Request)), st.integers(0, 2**32 - 1)),
    payloads,
    st.integers(0, 3),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(any_message, max_size=40),
    st.sampled_from([None, None, ValueError, OSError, KeyError]),
    st.sampled_from([0, WINDOW]),
)
def test_random_messages(
    messages: list[tuple[int, bytes, int, bool]], refuse: type[Exception] | None, window_bytes: int
) -> None:
    """Nothing but ProtocolError comes of them, and no descriptor stays open."""
    logging.disable(logging.WARNING)
    before = open_fds()
    bench = Bench(window_bytes)
    bench.device.refuse = refuse
    try:
        for request, payload, fds, need_reply in messages:
            reply = bench.send(request, payload, [0] * fds, need_reply=need_reply)
            assert not need_reply or reply is not None
    except ProtocolError as error:
        assert "GET_VRING_BASE" in str(error)
    finally:
        bench.device.refuse = None
        bench.close()
        logging.disable(logging.NOTSET)
    assert not bench.device.rings
    assert not leaked(before)


def valid_ring_messages(index: int) -> st.SearchStrategy[tuple[int, bytes, int, bool]]:
    state = pack_vring_state
    return st.sampled_from(
        [
            (Request.SET_MEM_TABLE, pack_memory_table([REGION]), 1, True),
            (Request.ADD_MEM_REG, pack_single_region(HIGH), 1, True),
            (Request.REM_MEM_REG, pack_single_region(HIGH), 0, True),
            (Request.SET_FEATURES, pack_u64(ALL), 0, True),
            (Request.SET_FEATURES, pack_u64(VIRTIO_F_VERSION_1), 0, True),
            (Request.SET_VRING_NUM, state(VringState(index, SIZE)), 0, True),
            (Request.SET_VRING_NUM, state(VringState(index, 2 * SIZE)), 0, True),
            (Request.SET_VRING_ADDR, ring_address(index), 0, True),
            (Request.SET_VRING_ADDR, ring_address(index, HIGH.user_addr), 0, True),
            (Request.SET_VRING_BASE, state(VringState(index, 17)), 0, True),
            (Request.SET_VRING_KICK, pack_u64(index), 1, True),
            (Request.SET_VRING_KICK, pack_u64(index | INVALID_FD), 0, True),
            (Request.SET_VRING_CALL, pack_u64(index), 1, True),
            (Request.SET_VRING_ERR, pack_u64(index), 1, True),
            (Request.SET_VRING_ENABLE, state(VringState(index, 1)), 0, True),
            (Request.SET_VRING_ENABLE, state(VringState(index, 0)), 0, True),
            (Request.GET_VRING_BASE, state(VringState(index, 0)), 0, True),
            (Request.RESET_OWNER, b"", 0, True),
            (Request.RESET_DEVICE, b"", 0, True),
        ]
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(valid_ring_messages(0), max_size=60))
def test_rings_agree_with_what_was_said(messages: list[tuple[int, bytes, int, bool]]) -> None:
    """A started ring is enabled if and only if the last word said so; nothing leaks in any sequence."""
    logging.disable(logging.WARNING)
    before = open_fds()
    bench = Bench()
    enabled = False
    try:
        for request, payload, fds, need_reply in messages:
            bench.send(request, payload, [0] * fds, need_reply=need_reply)
            if request == Request.SET_VRING_ENABLE:
                enabled = payload[4] == 1
            elif request in (Request.RESET_OWNER, Request.RESET_DEVICE):
                enabled = False
            elif request == Request.SET_FEATURES and payload == pack_u64(VIRTIO_F_VERSION_1):
                enabled = True
            assert bench.device.enabled in ({}, {0: enabled})
    finally:
        bench.close()
        logging.disable(logging.NOTSET)
    assert not leaked(before)
