"""The driver's side of a virtqueue, against a device in Python."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from coherent_vfs.guest.ring import DESCRIPTORS_PER_SLOT, Ring
from tests.unit.guest.device import Chain, Device

SLOTS = 4
HEADER = bytes(range(40))


@pytest.fixture(params=[False, True], ids=["direct", "indirect"])
def indirect(request: pytest.FixtureRequest) -> bool:
    """Whether indirect descriptors are used."""
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    """Whether EVENT_IDX is used."""
    return bool(request.param)


@pytest.fixture
def device(indirect: bool, event_idx: bool) -> Iterator[Device]:
    """A ring and a device on it."""
    memory = bytearray(1 << 20)
    ring = Ring(memory, 100, SLOTS, 20_000, 10_000, indirect, event_idx)
    yield Device(memory, ring)
    ring.close()


def test_the_parts_lie_in_order_and_aligned(device: Device) -> None:
    ring = device.ring
    assert ring.size == SLOTS * DESCRIPTORS_PER_SLOT
    assert 100 <= ring.descriptors < ring.available < ring.used < ring.end <= 1 << 20
    assert (ring.descriptors % 16, ring.available % 2, ring.used % 4) == (0, 0, 0)
    assert ring.available >= ring.descriptors + 16 * ring.size
    assert ring.used >= ring.available + 6 + 2 * ring.size


def test_a_request_and_its_reply(device: Device) -> None:
    ring = device.ring
    ring.place(2, HEADER, b"arguments", b"data" * 1000, 16 + 5000)
    ring.publish(2)
    chain = device.take()
    assert chain.readable == [HEADER, b"arguments", b"data" * 1000]
    assert [length for _, length in chain.writable] == [16, 5000]
    assert ring.reap() == []
    device.answer(chain, b"reply")
    assert ring.reap() == [(2, 5)]
    assert ring.reply(2, 5) == b"reply"
    assert ring.reap() == []


@pytest.mark.parametrize(
    ("arguments", "data", "room", "parts"),
    [
        (b"", b"", 0, (1, 0)),
        (b"a", b"", 0, (2, 0)),
        (b"", b"", 16, (1, 1)),
        (b"", b"d", 16, (2, 1)),
        (b"", b"", 17, (1, 2)),
    ],
)
def test_empty_parts_take_no_descriptor(
    device: Device, arguments: bytes, data: bytes, room: int, parts: tuple[int, int]
) -> None:
    device.ring.place(0, HEADER, arguments, data, room)
    device.ring.publish(0)
    chain = device.take()
    assert (len(chain.readable), len(chain.writable)) == parts


def test_many_requests_in_flight_end_in_any_order(device: Device) -> None:
    ring = device.ring
    # The indices wrap at 65,536.
    for turn in range(20_000):
        chains: list[tuple[int, Chain]] = []
        for slot in range(SLOTS):
            ring.place(slot, HEADER, b"%d" % slot, b"", 100)
            ring.publish(slot)
            chains.append((slot, device.take()))
        if turn % 2:
            chains.reverse()
        for slot, chain in chains:
            assert chain.readable[1] == b"%d" % slot
            device.use(chain.head, slot)
        assert ring.reap() == [(slot, slot) for slot, _ in chains]


def test_the_device_is_kicked_only_if_it_wants(device: Device, event_idx: bool) -> None:
    kicks = []
    for want in (True, False, True, True, False):
        device.want_kick(want, event_idx)
        device.ring.place(0, HEADER, b"", b"", 16)
        kicks.append(device.ring.publish(0))
        device.answer(device.take(), b"")
        device.ring.reap()
    assert kicks == [True, False, True, True, False]


def test_before_sleeping_the_driver_asks_to_be_called(device: Device, event_idx: bool) -> None:
    ring = device.ring
    for turn in range(3):
        assert not ring.arm()
        if event_idx:
            assert device.wants_call == turn
        ring.place(0, HEADER, b"", b"", 16)
        ring.publish(0)
        device.answer(device.take(), b"")
        assert ring.arm()
        assert len(ring.reap()) == 1


@pytest.mark.parametrize("head", [1, DESCRIPTORS_PER_SLOT, 3 * DESCRIPTORS_PER_SLOT + 1, 1000, 0xFFFFFFFF])
def test_a_device_that_uses_what_it_was_not_given_is_an_error(device: Device, head: int) -> None:
    device.ring.place(0, HEADER, b"", b"", 16)
    device.ring.publish(0)
    device.use(head, 0)
    with pytest.raises(OSError, match="no chain in flight") as raised:
        device.ring.reap()
    assert raised.value.errno == errno.EIO


def test_a_device_that_uses_a_chain_twice_is_an_error(device: Device) -> None:
    device.ring.place(0, HEADER, b"", b"", 16)
    device.ring.publish(0)
    device.use(0, 0)
    device.use(0, 0)
    with pytest.raises(OSError, match="no chain in flight"):
        device.ring.reap()


def test_a_device_that_claims_to_have_written_too_much_is_an_error(device: Device) -> None:
    device.ring.place(0, HEADER, b"", b"", 16)
    device.ring.publish(0)
    device.use(0, 1 << 20)
    with pytest.raises(OSError, match="wrote 1048576 bytes"):
        device.ring.reap()


def test_wrong_use(device: Device) -> None:
    ring = device.ring
    with pytest.raises(ValueError, match="slot 4 of 4"):
        ring.place(SLOTS, HEADER, b"", b"", 16)
    with pytest.raises(ValueError, match="request is too long"):
        ring.place(0, HEADER, b"", bytes(30_000), 16)
    with pytest.raises(ValueError, match="reply would be too long"):
        ring.place(0, HEADER, b"", b"", 20_000)
    ring.place(0, HEADER, b"", b"", 16)
    ring.publish(0)
    with pytest.raises(ValueError, match="in flight"):
        ring.place(0, HEADER, b"", b"", 16)
    ring.close()
    with pytest.raises(ValueError, match="closed"):
        ring.reap()


@pytest.mark.parametrize("slots", [0, 3, 8192])
def test_slots_must_be_a_power_of_two(slots: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Ring(bytearray(1 << 20), 0, slots, 100, 100, True, True)


def test_the_memory_must_suffice() -> None:
    with pytest.raises(ValueError, match="the memory at 4096"):
        Ring(bytearray(4096), 0, 4, 100, 100, True, True)
