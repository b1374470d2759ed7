"""A device without virtqueues, which records what the vhost-user handler makes of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from coherent_vfs.server.vhost_user.interface import Region, Ring
from coherent_vfs.server.vhost_user.messages import (
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)


class FakeDevice:
    """Implements server.vhost_user.interface.Device and checks what that promises."""

    features = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX
    queue_count = 3
    config = struct.pack("<36sII", b"myshare", 2, 0)

    def __init__(self, window_bytes: int = 0) -> None:
        self.window_bytes = window_bytes
        self.backend_channel: int | None = None
        self.accepted: int | None = None
        self.memory: list[tuple[int, int, int, int]] = []
        self.rings: dict[int, Ring] = {}
        self.enabled: dict[int, bool] = {}
        self.calls: dict[int, int | None] = {}
        self.consumed = 0
        """How far a ring's base has moved when it stops."""
        self.resets = 0
        self.refuse: type[Exception] | None = None
        """Raise this from whatever may fail."""

    def set_features(self, features: int) -> None:
        assert not features & ~self.features
        self.accepted = features

    def set_memory(self, regions: Sequence[Region]) -> None:
        for region in regions:
            os.close(region.fd)
        self._maybe_refuse()
        self.memory = [(r.guest_addr, r.size, r.user_addr, r.mmap_offset) for r in regions]

    def add_region(self, region: Region) -> None:
        os.close(region.fd)
        self._maybe_refuse()
        self.memory.append((region.guest_addr, region.size, region.user_addr, region.mmap_offset))

    def remove_region(self, guest_addr: int, size: int, user_addr: int) -> None:
        for region in self.memory:
            if region[:3] == (guest_addr, size, user_addr):
                self.memory.remove(region)
                return
        raise KeyError(f"no region at {guest_addr:#x}")

    def set_backend_channel(self, fd: int | None, *, shared_objects: bool = False, replaces: bool = False) -> None:
        if fd is not None and self.refuse is not None:
            _close(fd)
            raise self.refuse("no")
        _close(self.backend_channel)
        self.backend_channel = fd

    def start_ring(self, index: int, ring: Ring) -> None:
        assert index not in self.rings, "started twice"
        if self.refuse is not None:
            _close(ring.kick, ring.call, ring.err)
            raise self.refuse("no")
        self.rings[index] = ring
        self.calls[index] = ring.call
        self.enabled[index] = False

    def enable_ring(self, index: int, enabled: bool) -> None:
        assert index in self.rings
        self.enabled[index] = enabled

    def set_call(self, index: int, fd: int | None) -> None:
        assert index in self.rings
        _close(self.calls[index])
        self.calls[index] = fd

    def stop_ring(self, index: int) -> int:
        ring = self.rings.pop(index)
        _close(ring.kick, self.calls.pop(index), ring.err)
        del self.enabled[index]
        return (ring.base + self.consumed) & 0xFFFF

    def drain(self, done: Callable[[], object]) -> None:
        raise AssertionError("nothing waits")

    def reset(self) -> None:
        self.resets += 1
        for index in list(self.rings):
            self.stop_ring(index)

    def _maybe_refuse(self) -> None:
        if self.refuse is not None:
            raise self.refuse("no")


def _close(*fds: int | None) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are, to see leaks."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # the descriptor that lists the directory
            continue
    return found


def leaked(before: dict[int, str]) -> dict[int, str]:
    """Descriptors opened since; others may have been closed, by the garbage collector for one."""
    return dict(open_fds().items() - before.items())
