"""vhost-user messages: numbers, limits and the binary layout of every payload we use.

Pure data, no input or output: the back-end (`connection.py`, `handler.py`) and the user-space front-end
(`guest/vhost_user.py`) share it. Everything follows QEMU's docs/interop/vhost-user.rst; numbers are in
the machine's own byte order.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

HEADER_SIZE = 12
MAX_PAYLOAD = 4096
"""Bytes. The largest payload in use is the reply to GET_SHMEM_CONFIG, 2056."""
MAX_FDS = 32
"""Descriptors in one message, and so regions in one memory table (the specification promises 8)."""
MAX_RING_SIZE = 32768
"""Descriptors in a split virtqueue (virtio 1.2, 2.7)."""

VERSION = 1
INVALID_FD = 1 << 8
"""In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes with it."""

VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30
VIRTIO_RING_F_INDIRECT_DESC = 1 << 28
VIRTIO_RING_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32


class ProtocolError(Exception):
    """The peer does not speak vhost-user, or stopped speaking it: the connection cannot go on."""


class Request(IntEnum):
    """What a front-end asks of a back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """What a back-end asks of a front-end, on the channel that SET_BACKEND_REQ_FD brings."""

    SHARED_OBJECT_REMOVE = 7
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_*: extensions negotiated beside the virtio features."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    SHARED_OBJECT = 1 << 18
    SHMEM = 1 << 22
    # Ours, in no specification, which lets no front-end do that: SHMEM_MAP replaces what is mapped in its place.
    SHMEM_REPLACE = 1 << 63


class HeaderFlag(IntFlag):
    """The second word of a header; its two low bits are the protocol's version."""

    VERSION_MASK = 0x3
    REPLY = 0x4
    NEED_REPLY = 0x8


_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_VRING_STATE = struct.Struct("=II")
_VRING_ADDRESS = struct.Struct("=IIQQQQ")
_MEMORY_TABLE = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_SINGLE_REGION_PADDING = 8
_CONFIG = struct.Struct("=III")
_UUID = struct.Struct("=16s")
_SHMEM_REGIONS = 256
_SHMEM_CONFIG = struct.Struct(f"=I4x{_SHMEM_REGIONS}Q")
_SHMEM_MAPPING = struct.Struct("=B7xQQQQ")
_SHMEM_WRITABLE = 1


@dataclass
class Message:
    """One message as received. It owns `fds` until somebody takes them."""

    request: int
    flags: int
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The specification's name of the request, or its number when it has none."""
        try:
            return Request(self.request).name
        except ValueError:
            return str(self.request)

    @property
    def need_reply(self) -> bool:
        """Whether the sender waits for an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & HeaderFlag.NEED_REPLY)

    def take_fds(self, count: int) -> list[int]:
        """Hand over all descriptors of the message.

        Args:
            count: how many there must be; ValueError when there are more or fewer.
        """
        if len(self.fds) != count:
            raise ValueError(f"{len(self.fds)} file descriptors came, {count} expected")
        taken, self.fds = self.fds, []
        return taken

    def close(self) -> None:
        """Close every descriptor that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True)
class VringState:
    """A ring's index and one number that belongs to it (size, base or enabled)."""

    index: int
    num: int


@dataclass(frozen=True)
class VringAddress:
    """Where a ring's three parts are, as user addresses of the front-end."""

    index: int
    desc: int
    used: int
    avail: int
    flags: int = 0
    log: int = 0


@dataclass(frozen=True)
class MemoryRegion:
    """A range of guest memory. Addresses, sizes and offsets are in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True)
class Config:
    """A piece of the virtio configuration space; `data` is what was or what is to be read there."""

    offset: int
    data: bytes
    flags: int = 0


@dataclass(frozen=True)
class SharedMapping:
    """A piece of a file in a shared memory region. Offsets and lengths are in bytes.

    `moffset` is the offset in the region, QEMU's shm_offset. SHMEM_UNMAP names a mapping by region, moffset and length.
    """

    moffset: int
    length: int
    file_offset: int = 0
    writable: bool = False
    region: int = 0


def pack_header(request: int, flags: int, size: int) -> bytes:
    """A message's header; `size` is that of its payload in bytes."""
    return _HEADER.pack(request, flags, size)


def unpack_header(header: bytes) -> tuple[int, int, int]:
    """A header's request, flags and payload size.

    Raises:
        ProtocolError: the version is not ours, or the payload is longer than MAX_PAYLOAD.
    """
    request, flags, size = _HEADER.unpack(header)
    if flags & HeaderFlag.VERSION_MASK != VERSION:
        raise ProtocolError(f"vhost-user version {flags & HeaderFlag.VERSION_MASK}, {VERSION} expected")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"message {request} has a payload of {size} bytes, {MAX_PAYLOAD} allowed")
    return request, flags, size


def _checked(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ValueError(f"payload of {len(payload)} bytes, {layout.size} expected")
    return layout.unpack(payload)


def pack_u64(value: int) -> bytes:
    """A payload of one 64-bit number."""
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    """The number in a 64-bit payload; ValueError when it has another size (so all unpack functions)."""
    return _checked(_U64, payload)[0]


def pack_vring_state(state: VringState) -> bytes:
    """Payload of SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE and GET_VRING_BASE."""
    return _VRING_STATE.pack(state.index, state.num)


def unpack_vring_state(payload: bytes) -> VringState:
    """Inverse of pack_vring_state."""
    return VringState(*_checked(_VRING_STATE, payload))


def pack_vring_address(address: VringAddress) -> bytes:
    """Payload of SET_VRING_ADDR."""
    a = address
    return _VRING_ADDRESS.pack(a.index, a.flags, a.desc, a.used, a.avail, a.log)


def unpack_vring_address(payload: bytes) -> VringAddress:
    """Inverse of pack_vring_address."""
    index, flags, desc, used, avail, log = _checked(_VRING_ADDRESS, payload)
    return VringAddress(index, desc, used, avail, flags, log)


def _pack_region(region: MemoryRegion) -> bytes:
    return _REGION.pack(region.guest_addr, region.size, region.user_addr, region.mmap_offset)


def pack_memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """Payload of SET_MEM_TABLE; one descriptor for each region goes with it, in the same order."""
    return _MEMORY_TABLE.pack(len(regions), 0) + b"".join(map(_pack_region, regions))


def unpack_memory_table(payload: bytes) -> list[MemoryRegion]:
    """Inverse of pack_memory_table. Bytes behind the last region are ignored: User-Mode Linux sends some."""
    if len(payload) < _MEMORY_TABLE.size:
        raise ValueError(f"memory table of {len(payload)} bytes")
    count, _ = _MEMORY_TABLE.unpack_from(payload)
    if count > MAX_FDS or len(payload) < _MEMORY_TABLE.size + count * _REGION.size:
        raise ValueError(f"memory table of {len(payload)} bytes for {count} regions, {MAX_FDS} allowed")
    regions = payload[_MEMORY_TABLE.size : _MEMORY_TABLE.size + count * _REGION.size]
    return [MemoryRegion(*fields) for fields in _REGION.iter_unpack(regions)]


def pack_single_region(region: MemoryRegion) -> bytes:
    """Payload of ADD_MEM_REG and REM_MEM_REG."""
    return bytes(_SINGLE_REGION_PADDING) + _pack_region(region)


def unpack_single_region(payload: bytes) -> MemoryRegion:
    """Inverse of pack_single_region."""
    return MemoryRegion(*_checked(_REGION, payload[_SINGLE_REGION_PADDING:]))


def pack_config(config: Config) -> bytes:
    """Payload of GET_CONFIG, of its reply, and of SET_CONFIG."""
    return _CONFIG.pack(config.offset, len(config.data), config.flags) + config.data


def unpack_config(payload: bytes) -> Config:
    """Inverse of pack_config."""
    if len(payload) < _CONFIG.size:
        raise ValueError(f"configuration access of {len(payload)} bytes")
    offset, size, flags = _CONFIG.unpack_from(payload)
    data = payload[_CONFIG.size :]
    if len(data) != size:
        raise ValueError(f"configuration access of {size} bytes with {len(data)} bytes of data")
    return Config(offset, data, flags)


def pack_shmem_config(sizes: Sequence[int]) -> bytes:
    """Payload of the reply to GET_SHMEM_CONFIG: the sizes of the shared memory regions 0, 1, ... in bytes."""
    return _SHMEM_CONFIG.pack(len(sizes), *sizes, *bytes(_SHMEM_REGIONS - len(sizes)))


def unpack_shmem_config(payload: bytes) -> list[int]:
    """Inverse of pack_shmem_config, when regions are numbered without gaps."""
    count, *sizes = _checked(_SHMEM_CONFIG, payload)
    if count > _SHMEM_REGIONS:
        raise ValueError(f"{count} shared memory regions, {_SHMEM_REGIONS} allowed")
    return sizes[:count]


def pack_shared_mapping(mapping: SharedMapping) -> bytes:
    """Payload of SHMEM_MAP, which brings the file's descriptor, and of SHMEM_UNMAP."""
    flags = _SHMEM_WRITABLE if mapping.writable else 0
    return _SHMEM_MAPPING.pack(mapping.region, mapping.file_offset, mapping.moffset, mapping.length, flags)


def unpack_shared_mapping(payload: bytes) -> SharedMapping:
    """Inverse of pack_shared_mapping."""
    region, file_offset, moffset, length, flags = _checked(_SHMEM_MAPPING, payload)
    if flags & ~_SHMEM_WRITABLE:
        raise ValueError(f"flags {flags:#x} of a shared mapping")
    return SharedMapping(moffset, length, file_offset, bool(flags), region)


def pack_shared_object(uuid: bytes) -> bytes:
    """Payload of SHARED_OBJECT_REMOVE: 16 bytes."""
    return _UUID.pack(uuid)
