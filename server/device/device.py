"""The virtio-fs device: what the vhost-user handler drives, and what its rings lead to."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.server.dax.truncations import Truncations
from coherent_vfs.server.dax.window import Window
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.device.request_queue import RequestQueue
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.settings import TAG_MAX, Settings
from coherent_vfs.server.vhost_user.backend_channel import SharedMemory
from coherent_vfs.server.vhost_user.interface import Busy, Region, Ring
from coherent_vfs.server.vhost_user.messages import (
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from coherent_vfs.server.virtio.guest_memory import GuestMemory
from coherent_vfs.server.virtio.virtqueue import Virtqueue

if TYPE_CHECKING:
    from coherent_vfs.coherence.client.membership import Membership
    from coherent_vfs.server.dax.view import View

log = get_logger(__name__)

HIPRIO: Final = 0


class FsDevice:
    """One guest's virtio-fs device (virtio 1.2, 5.11), a server.vhost_user.interface.Device.

    Args:
        settings: the share.
        loop: what serves the rings once they run.
        membership: the domain that the share belongs to, or None.
        view: what the guest's DAX window shows of files; goes with a window.
    """

    def __init__(
        self, settings: Settings, loop: EventLoop, membership: Membership | None = None, view: View | None = None
    ) -> None:
        self.features = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX
        self.queue_count = 1 + settings.num_request_queues
        tag = (settings.tag or "").encode()
        self.config = struct.pack(f"<{TAG_MAX}sII", tag, settings.num_request_queues, 0)
        if membership is None:
            self.fs = FileSystem(settings)
        else:
            self.fs = FileSystem(settings, membership.table, membership.journal, membership.leases)
        self.window_bytes = settings.window_bytes
        self.shared_memory = SharedMemory(settings.window_bytes, loop)
        if membership is not None:
            self.fs.mapped.truncate_with(Truncations(membership.dax, self.fs))
        if membership is not None and view is not None:
            window = Window(settings.window_bytes, self.shared_memory, membership.dax, view, self.fs)
            self.shared_memory.on_reset = window.reset
            membership.dax.attach(window.revoke, window.resize)
            self.fs.mapped.use_window(window)
            view.on_end = self.fs.mapped.advise_no_dax
        self._settings = settings
        self._loop = loop
        self._memory = GuestMemory()
        self._queues: dict[int, RequestQueue] = {}
        self._enabled: set[int] = set()
        self._event_idx = False

    def set_features(self, features: int) -> None:
        self._event_idx = bool(features & VIRTIO_RING_F_EVENT_IDX)

    def set_memory(self, regions: Sequence[Region]) -> None:
        memory = GuestMemory()
        try:
            for region in regions:
                _map(memory, region)
        finally:
            for region in regions:
                os.close(region.fd)
        self._memory.exchange(memory)
        self._rebind()

    def add_region(self, region: Region) -> None:
        try:
            _map(self._memory, region)
        finally:
            os.close(region.fd)

    def remove_region(self, guest_addr: int, size: int, user_addr: int) -> None:
        self._memory.remove(guest_addr, size, user_addr)
        self._rebind()

    def set_backend_channel(self, fd: int | None, *, shared_objects: bool = False, replaces: bool = False) -> None:
        if fd is None:
            self.shared_memory.disconnect()
        else:
            self.shared_memory.connect(fd, shared_objects=shared_objects, replaces=replaces)

    def start_ring(self, index: int, ring: Ring) -> None:
        try:
            if not ring.size <= self._settings.queue_size:
                raise ValueError(f"a queue of {ring.size} descriptors is over --queue-size")
            virtqueue = Virtqueue(self._memory, ring.size, ring.desc, ring.avail, ring.used, ring.base, self._event_idx)
            queue = RequestQueue(
                virtqueue,
                self.fs,
                ring.kick,
                ring.call,
                ring.err,
                index == HIPRIO,
                lambda: self._end_broken(index),
            )
        except (ValueError, OSError):
            for fd in (ring.kick, ring.call, ring.err):
                if fd is not None:
                    os.close(fd)
            raise
        try:
            self._loop.add_queue(queue)
        except OSError:  # a kick descriptor that cannot be waited on
            queue.close()
            raise
        self._queues[index] = queue

    def enable_ring(self, index: int, enabled: bool) -> None:
        if not enabled:
            # QEMU does this before it asks for the base: what is parked must not be lost.
            self._halt(index)
            self._enabled.discard(index)
        self._queues[index].enable(enabled)
        if enabled:
            self._enabled.add(index)
            if self._enabled == self._queues.keys():
                self.shared_memory.start()

    def set_call(self, index: int, fd: int | None) -> None:
        self._queues[index].replace_call(fd)

    def stop_ring(self, index: int) -> int:
        self._halt(index)
        return self._drop_ring(index)

    def drain(self, done: Callable[[], object]) -> None:
        def drained() -> None:
            self.fs.publisher.abandoning = False
            done()

        # The front-end waits for us, and takes no requests: what would wait for it fails with EINTR, and at once.
        self.shared_memory.stop()
        self.fs.publisher.abandoning = True
        self.fs.wake()
        self._loop.drain(drained)

    def reset(self) -> None:
        self._loop.drain(None)
        self.fs.publisher.abandoning = False
        self.shared_memory.stop()
        for index in list(self._queues):
            self._drop_ring(index)
        self.shared_memory.reset()
        self.fs.reset()

    @property
    def parked(self) -> int:
        """Requests that wait for leases of others now."""
        return sum(queue.parked for queue in self._queues.values())

    def close(self) -> None:
        """Stop everything and let go of the guest's memory."""
        self.reset()
        self.shared_memory.disconnect()
        self._memory.clear()

    def _halt(self, index: int) -> None:
        """A ring is to be disabled or stopped: with the first of them the whole device stops."""
        # The driver keeps the ring, but not the account of what we have taken from it.
        if self._queues[index].parked:
            raise Busy
        self.shared_memory.stop()

    def _drop_ring(self, index: int) -> int:
        self._enabled.discard(index)
        queue = self._queues.pop(index)
        self._loop.remove_queue(queue)
        queue.close()
        return queue.base

    def _rebind(self) -> None:
        for index, queue in self._queues.items():
            try:
                queue.ring.rebind()
            except ValueError as error:
                queue.enable(False)
                self._fail(f"queue {index}: {error}")

    def _end_broken(self, index: int) -> None:
        """A queue cannot go on."""
        if self._memory.lost:
            self._fail("a part of the guest's memory is gone: the file behind it was made smaller")
        else:
            self._fail(f"the guest broke the ring of queue {index}")

    def _fail(self, reason: str) -> None:
        """A guest that breaks a ring loses its session; it can have another after a reset."""
        log.error("guest's session ended", tag=self._settings.tag, reason=reason)
        for queue in self._queues.values():
            queue.enable(False)
        self.fs.reset()


def _map(memory: GuestMemory, region: Region) -> None:
    memory.add(region.guest_addr, region.size, region.user_addr, region.mmap_offset, region.fd)
