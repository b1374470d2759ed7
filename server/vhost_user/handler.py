"""The back-end's side of a vhost-user conversation: what one front-end has set up, and what it asks next.

Follows QEMU's docs/interop/vhost-user.rst. Requests may come in any order; a ring starts as soon as its
size, its addresses, its kick descriptor and the memory that holds it are all there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.server.vhost_user.connection import Connection
from coherent_vfs.server.vhost_user.interface import Busy, Device, Region, Ring
from coherent_vfs.server.vhost_user.messages import (
    INVALID_FD,
    MAX_RING_SIZE,
    VHOST_USER_F_PROTOCOL_FEATURES,
    Config,
    MemoryRegion,
    Message,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
    pack_config,
    pack_shmem_config,
    pack_u64,
    pack_vring_state,
    unpack_config,
    unpack_memory_table,
    unpack_single_region,
    unpack_u64,
    unpack_vring_address,
    unpack_vring_state,
)
from coherent_vfs.server.virtio.guest_memory import MAX_REGIONS

_log = get_logger(__name__)

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    # Without it User-Mode Linux has no interrupt for its rings: arch/um/drivers/virtio_uml.c.
    | ProtocolFeature.BACKEND_REQ
)
"""What we offer. Not STATUS: QEMU sends status 0 when a running machine is merely paused, and a guest must
not lose its mount by that; a guest's restart is told by RESET_DEVICE and by its new FUSE_INIT."""

WINDOW_FEATURES = (
    ProtocolFeature.SHMEM
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.SHARED_OBJECT
    | ProtocolFeature.SHMEM_REPLACE
)
"""What a device with a window offers besides. It has no shared objects; shared_memory.py says what for."""

_ADDRESS_END = 1 << 64


@dataclass
class _RingState:
    """One ring as the front-end described it; it owns the descriptors it was given."""

    size: int | None = None
    address: VringAddress | None = None
    base: int = 0
    kicked: bool = False
    kick: int | None = None
    call: int | None = None
    err: int | None = None
    enabled: bool = False
    started: bool = False

    def parts(self) -> list[tuple[int, int]] | None:
        """User address and length in bytes of descriptor table, available and used ring, once known."""
        if self.size is None or self.address is None:
            return None
        # virtio 1.2, 2.7: with the event words at the end of the two rings.
        return [
            (self.address.desc, 16 * self.size),
            (self.address.avail, 6 + 2 * self.size),
            (self.address.used, 6 + 8 * self.size),
        ]

    def forget_kick(self) -> None:
        """The front-end has to kick again before the ring may start."""
        self.kick = _replace(self.kick, None)
        self.kicked = False

    def close(self) -> None:
        """Close all descriptors."""
        self.forget_kick()
        self.call = _replace(self.call, None)
        self.err = _replace(self.err, None)


def _replace(old: int | None, new: int | None) -> int | None:
    if old is not None:
        os.close(old)
    return new


def _duplicates(*fds: int | None) -> list[int | None]:
    duplicates: list[int | None] = []
    try:
        for fd in fds:
            duplicates.append(None if fd is None else os.dup(fd))
    except OSError:
        for fd in duplicates:
            _replace(fd, None)
        raise
    return duplicates


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


class Handler:
    """Protocol state of one connection; drives `device`, which no other connection may use meanwhile.

    Args:
        device: the device that the front-end controls.
        connection: where replies go.
    """

    def __init__(self, device: Device, connection: Connection) -> None:
        self._device = device
        self._connection = connection
        self._rings = [_RingState() for _ in range(device.queue_count)]
        self._regions: list[MemoryRegion] = []
        self.features = 0
        """Virtio features that the front-end accepted, with VHOST_USER_F_PROTOCOL_FEATURES."""
        self.protocol_features = ProtocolFeature(0)
        """Protocol features that the front-end accepted."""
        self.backend_channel: int | None = None
        """The socket of a front-end that would take requests of ours, none of which it knows."""
        self._offered = PROTOCOL_FEATURES | (WINDOW_FEATURES if device.window_bytes else 0)
        self._methods: dict[int, Callable[[Message], bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.RESET_DEVICE: self._reset_device,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
        }
        if device.window_bytes:
            self._methods[Request.GET_SHMEM_CONFIG] = self._get_shmem_config

    def handle(self, message: Message) -> None:
        """Do what `message` asks and answer it; its descriptors are kept or closed.

        A request that cannot be done is answered with a failure where an answer was asked for, and logged.
        An answer is sent whenever the NEED_REPLY flag is set: a front-end that sets it waits for one
        (User-Mode Linux does so already in the message that negotiates REPLY_ACK).

        Raises:
            Busy: nothing was done, and the message keeps its descriptors: pass it again when the device is drained.
            ProtocolError: the front-end cannot be answered: it is gone, does not read, or asked for a
                reply that has no form for a failure.
        """
        again = False
        try:
            method = self._methods.get(message.request)
            if method is None:
                _log.info("vhost-user request not supported", request=message.name)
                if message.need_reply:
                    self._connection.reply(message, pack_u64(1))
                return
            try:
                reply = method(message)
                status = 0
            except (ValueError, KeyError, OSError) as error:
                _log.warning("vhost-user request failed", request=message.name, reason=str(error))
                reply = self._failure_reply(message, error)
                status = 1
            if reply is not None:
                self._connection.reply(message, reply)
            elif message.need_reply:
                self._connection.reply(message, pack_u64(status))
        except Busy:
            again = True
            raise
        finally:
            if not again:
                message.close()

    def close(self) -> None:
        """The connection ended: drop all state of the session and everything the front-end gave us."""
        self._reset()
        self._device.set_memory([])
        self._regions = []
        self._device.set_backend_channel(None)
        self.backend_channel = _replace(self.backend_channel, None)

    @staticmethod
    def _failure_reply(message: Message, error: Exception) -> bytes | None:
        """The reply that tells the front-end of `error`, None where an acknowledgement does."""
        if message.request == Request.GET_CONFIG:
            return b""
        if message.request == Request.GET_VRING_BASE:
            raise ProtocolError(f"{message.name} cannot be answered: {error}") from error
        return None

    # Features

    def _get_features(self, message: Message) -> bytes:
        return pack_u64(self._device.features | VHOST_USER_F_PROTOCOL_FEATURES)

    def _set_features(self, message: Message) -> None:
        features = unpack_u64(message.payload)
        unknown = features & ~(self._device.features | VHOST_USER_F_PROTOCOL_FEATURES)
        if unknown:
            raise ValueError(f"features {unknown:#x} were not offered")
        self._device.set_features(features & ~VHOST_USER_F_PROTOCOL_FEATURES)
        self.features = features
        if not features & VHOST_USER_F_PROTOCOL_FEATURES:
            for index in range(len(self._rings)):
                self._enable(index, True)

    def _get_protocol_features(self, message: Message) -> bytes:
        return pack_u64(self._offered)

    def _set_protocol_features(self, message: Message) -> None:
        features = unpack_u64(message.payload)
        unknown = features & ~self._offered
        if unknown:
            raise ValueError(f"protocol features {unknown:#x} were not offered")
        self.protocol_features = ProtocolFeature(features)

    def _get_queue_num(self, message: Message) -> bytes:
        return pack_u64(self._device.queue_count)

    # The session

    def _set_owner(self, message: Message) -> None:
        """Nothing to do: the connection is the session."""

    def _reset_owner(self, message: Message) -> None:
        """Deprecated; the specification allows no more than disabling all rings."""
        for index in range(len(self._rings)):
            self._enable(index, False)

    def _reset_device(self, message: Message) -> None:
        self._reset()

    def _reset(self) -> None:
        # Guest memory stays: a front-end that manages memory slots sends only what changed.
        self._device.reset()
        for ring in self._rings:
            ring.close()
        self._rings = [_RingState() for _ in self._rings]

    def _set_backend_req_fd(self, message: Message) -> None:
        fd = message.take_fds(1)[0]
        if ProtocolFeature.SHMEM in self.protocol_features:
            shared_objects = ProtocolFeature.SHARED_OBJECT in self.protocol_features
            replaces = ProtocolFeature.SHMEM_REPLACE in self.protocol_features
            self._device.set_backend_channel(fd, shared_objects=shared_objects, replaces=replaces)
        else:  # closing it would look like a failure of ours
            self.backend_channel = _replace(self.backend_channel, fd)

    def _get_shmem_config(self, message: Message) -> bytes:
        return pack_shmem_config([self._device.window_bytes])

    # Guest memory

    def _set_mem_table(self, message: Message) -> None:
        regions = unpack_memory_table(message.payload)
        accepted: list[MemoryRegion] = []
        for region in regions:
            self._check_region(region, accepted)
            accepted.append(region)
        fds = message.take_fds(len(regions))
        self._device.set_memory([_with_fd(region, fd) for region, fd in zip(regions, fds, strict=True)])
        self._regions = regions
        self._start_rings()

    def _get_max_mem_slots(self, message: Message) -> bytes:
        return pack_u64(MAX_REGIONS)

    def _add_mem_reg(self, message: Message) -> None:
        region = unpack_single_region(message.payload)
        self._check_region(region, self._regions)
        self._device.add_region(_with_fd(region, *message.take_fds(1)))
        self._regions.append(region)
        self._start_rings()

    def _rem_mem_reg(self, message: Message) -> None:
        # Some front-ends send a descriptor along; the specification has us close it unused.
        gone = unpack_single_region(message.payload)
        self._device.remove_region(gone.guest_addr, gone.size, gone.user_addr)
        self._regions = [
            region
            for region in self._regions
            if (region.guest_addr, region.size, region.user_addr) != (gone.guest_addr, gone.size, gone.user_addr)
        ]

    @staticmethod
    def _check_region(region: MemoryRegion, others: list[MemoryRegion]) -> None:
        size = region.size
        if not size or max(region.guest_addr, region.user_addr, region.mmap_offset) + size > _ADDRESS_END:
            raise ValueError(f"{region} is empty or wraps around")
        for other in others:
            if _overlap(region.guest_addr, size, other.guest_addr, other.size) or _overlap(
                region.user_addr, size, other.user_addr, other.size
            ):
                raise ValueError(f"{region} overlaps {other}")

    def _in_memory(self, user_addr: int, size: int) -> bool:
        return any(
            region.user_addr <= user_addr and user_addr + size <= region.user_addr + region.size
            for region in self._regions
        )

    # Rings

    def _ring(self, index: int) -> _RingState:
        if index >= len(self._rings):
            raise ValueError(f"no ring {index}, there are {len(self._rings)}")
        return self._rings[index]

    def _start_rings(self) -> None:
        for index in range(len(self._rings)):
            self._start(index)

    def _start(self, index: int) -> None:
        """Start a ring if it is stopped and everything it needs is there."""
        ring = self._rings[index]
        parts = ring.parts()
        if ring.started or not ring.kicked or parts is None or not self._regions:
            return
        assert ring.size is not None and ring.address is not None
        if not all(self._in_memory(*part) for part in parts):
            _log.warning("ring is outside guest memory and waits for more", ring=index)
            return
        # The device gets descriptors of its own, so that the ring can start again with what we keep.
        address = ring.address
        try:
            fds = _duplicates(ring.kick, ring.call, ring.err)
            self._device.start_ring(index, Ring(ring.size, address.desc, address.used, address.avail, ring.base, *fds))
        except (ValueError, OSError):
            ring.forget_kick()  # or every later request would try again
            raise
        ring.started = True
        if ring.enabled:
            self._device.enable_ring(index, True)

    def _stop(self, index: int) -> None:
        """Stop a ring until the front-end kicks again; it keeps its place in the available ring."""
        ring = self._rings[index]
        if ring.started:
            ring.base = self._device.stop_ring(index)
            ring.started = False
        ring.forget_kick()

    def _enable(self, index: int, enabled: bool) -> None:
        ring = self._rings[index]
        if ring.started:
            self._device.enable_ring(index, enabled)
        ring.enabled = enabled

    # A front-end that describes a started ring anew means another one: User-Mode Linux, when its driver is
    # bound again, never sends GET_VRING_BASE before it does so. So each of the next three stops the ring.

    def _set_vring_num(self, message: Message) -> None:
        state = unpack_vring_state(message.payload)
        ring = self._ring(state.index)
        if not 0 < state.num <= MAX_RING_SIZE or state.num & (state.num - 1):
            raise ValueError(f"{state.num} is no size for a ring")
        if state.num != ring.size:
            self._stop_started(state.index)
        ring.size = state.num
        self._start(state.index)

    def _set_vring_addr(self, message: Message) -> None:
        address = unpack_vring_address(message.payload)
        ring = self._ring(address.index)
        if address.flags:
            raise ValueError(f"ring flags {address.flags:#x}: logging was not offered")
        if address.desc % 16 or address.avail % 2 or address.used % 4:
            raise ValueError(f"{address} is not aligned")
        if address != ring.address:
            self._stop_started(address.index)
        ring.address = address
        self._start(address.index)

    def _set_vring_base(self, message: Message) -> None:
        state = unpack_vring_state(message.payload)
        ring = self._ring(state.index)
        if state.num > 0xFFFF:
            raise ValueError(f"{state.num} is no index of a split ring")
        self._stop_started(state.index)
        ring.base = state.num

    def _stop_started(self, index: int) -> None:
        """Stop a ring that runs; one that has only been kicked may still start."""
        if self._rings[index].started:
            self._stop(index)

    def _get_vring_base(self, message: Message) -> bytes:
        index = unpack_vring_state(message.payload).index
        ring = self._ring(index)
        self._stop(index)
        return pack_vring_state(VringState(index, ring.base))

    def _set_vring_kick(self, message: Message) -> None:
        index, fd = self._take_ring_fd(message)
        try:
            self._stop(index)
        except Busy:
            message.fds = [] if fd is None else [fd]
            raise
        ring = self._rings[index]
        ring.kick = fd
        ring.kicked = True
        self._start(index)

    def _set_vring_call(self, message: Message) -> None:
        index, fd = self._take_ring_fd(message)
        ring = self._rings[index]
        ring.call = _replace(ring.call, fd)
        if ring.started:
            self._device.set_call(index, *_duplicates(fd))

    def _set_vring_err(self, message: Message) -> None:
        """Takes effect when the ring starts next; front-ends set it before."""
        index, fd = self._take_ring_fd(message)
        ring = self._rings[index]
        ring.err = _replace(ring.err, fd)

    def _take_ring_fd(self, message: Message) -> tuple[int, int | None]:
        value = unpack_u64(message.payload)
        index = value & 0xFF
        self._ring(index)
        for fd in message.fds:
            os.set_blocking(fd, False)  # a pipe that nobody empties must not stop us
        fds = message.take_fds(0 if value & INVALID_FD else 1)
        return index, fds[0] if fds else None

    def _set_vring_enable(self, message: Message) -> None:
        state = unpack_vring_state(message.payload)
        self._ring(state.index)
        if state.num > 1:
            raise ValueError(f"a ring is enabled by 1 and disabled by 0, not {state.num}")
        self._enable(state.index, bool(state.num))

    # Configuration space

    def _get_config(self, message: Message) -> bytes:
        """What is asked for beyond the end reads as zeros, as a front-end may know a longer layout."""
        asked = unpack_config(message.payload)
        data = self._device.config[asked.offset : asked.offset + len(asked.data)]
        return pack_config(Config(asked.offset, data.ljust(len(asked.data), b"\0"), asked.flags))

    def _set_config(self, message: Message) -> None:
        raise ValueError("the configuration space is read-only")


def _with_fd(region: MemoryRegion, fd: int) -> Region:
    return Region(region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd)
