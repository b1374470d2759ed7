"""What the protocol handler asks of a device: the seam between vhost-user and the virtqueues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Region:
    """A range of guest memory to be mapped from `fd`, which now belongs to the device. All in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    fd: int


@dataclass(frozen=True)
class Ring:
    """A split virtqueue that is to start. Its descriptors do not block and now belong to the device.

    `desc`, `used` and `avail` are user addresses of the front-end, aligned as virtio demands, and were
    within the memory regions when the ring started. `base` is the next index to read in the available
    ring. Without `kick` the ring has to be polled, without `call` the driver polls the used ring.
    """

    size: int
    desc: int
    used: int
    avail: int
    base: int
    kick: int | None
    call: int | None
    err: int | None


class Busy(Exception):
    """A ring cannot be stopped yet: requests of it wait. Ask the same again when Device.drain() calls back."""


class Device(Protocol):
    """The handler calls these from the thread that reads the front-end's socket.

    A descriptor belongs to the device as soon as it is passed, also when the call fails. ValueError,
    KeyError and OSError say that a request cannot be done, and must leave the device as it was.
    """

    features: int
    """Virtio features on offer, without VHOST_USER_F_PROTOCOL_FEATURES."""
    queue_count: int
    """The high-priority queue and all request queues."""
    config: bytes
    """The configuration space (struct virtio_fs_config)."""
    window_bytes: int
    """Size of shared memory region 0, the DAX window: 0 for none, or a power of two from 2 MiB."""

    def set_features(self, features: int) -> None:
        """The front-end accepted these virtio features, a subset of `features`."""

    def set_memory(self, regions: Sequence[Region]) -> None:
        """Replace all guest memory; rings that run go on in the new memory or are broken by it.

        Regions do not overlap and do not wrap around. A front-end sends the same ones again at will.
        """

    def add_region(self, region: Region) -> None:
        """Add one range of guest memory, which overlaps no other; ValueError when there are too many."""

    def remove_region(self, guest_addr: int, size: int, user_addr: int) -> None:
        """Take away exactly this range of guest memory; KeyError when there is none such."""

    def set_backend_channel(self, fd: int | None, *, shared_objects: bool = False, replaces: bool = False) -> None:
        """Ask the front-end for mappings at this socket, a connected stream; None: no longer.

        Called only for a device with a window, and a front-end that has SHMEM.

        Args:
            fd: the socket.
            shared_objects: whether the front-end has SHARED_OBJECT.
            replaces: whether it has SHMEM_REPLACE.
        """

    def start_ring(self, index: int, ring: Ring) -> None:
        """Start a stopped ring, disabled: nothing of it is served before enable_ring(index, True)."""

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Serve a started ring, or leave it alone until it is enabled again.

        Busy when it cannot be left alone yet, which leaves everything as it was.
        """

    def set_call(self, index: int, fd: int | None) -> None:
        """Replace the descriptor that tells the driver of used buffers, of a started ring.

        What was used in the meantime may have been told to the old one: notify once on the new one.
        """

    def stop_ring(self, index: int) -> int:
        """Stop a started ring, broken or not, close its descriptors, and return its next available index.

        Busy when it cannot be stopped yet, which leaves everything as it was.
        """

    def drain(self, done: Callable[[], object]) -> None:
        """After Busy: take nothing new from any ring, and call back once when no request waits any more.

        A reset comes before: then nobody is called.
        """

    def reset(self) -> None:
        """The driver is gone: stop every ring and drop all state of the session, except guest memory."""
