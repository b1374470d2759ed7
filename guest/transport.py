"""How FUSE messages reach a server: over the virtqueues of a vhost-user back-end, as from a real guest."""

from __future__ import annotations

import errno
import itertools
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.guest.ring import Ring
from coherent_vfs.guest.vhost_user import PROTOCOL_FEATURES, WINDOW_FEATURES, FrontEnd
from coherent_vfs.guest.window import Window
from coherent_vfs.server.fuse.protocol import OUT_HEADER
from coherent_vfs.server.vhost_user.messages import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, ProtocolError

Buffer = bytes | bytearray | memoryview

MAX_DATA: Final = 1 << 20
"""Largest data of one READ or WRITE, bytes."""
SLOTS: Final = 16
"""Requests in flight in each queue."""
OVERHEAD: Final = 8192
"""Room in a slot beside the data: headers, arguments, names."""
HIPRIO_BYTES: Final = 4096
"""Room of a slot of the hiprio queue."""


class Transport(Protocol):
    """What carries FUSE messages between a client and a server. Several threads may use one."""

    @property
    def max_data(self) -> int:
        """Largest data of one message, bytes."""

    def exchange(self, header: bytes, arguments: bytes, data: Buffer, reply_bytes: int) -> bytes:
        """Send a request and wait for its reply.

        Args:
            header: the fuse_in_header.
            arguments: the operation's structure and names.
            data: bulk data, or empty.
            reply_bytes: room for the reply, its header included.

        Returns:
            The whole reply, with its fuse_out_header.

        Raises:
            OSError: ENOTCONN, the server is gone; EIO, it broke the ring; ETIMEDOUT, no reply came in time.
        """

    def post(self, header: bytes, arguments: bytes) -> None:
        """Send a request that has no reply (FORGET, BATCH_FORGET, INTERRUPT); errors as of exchange()."""

    def close(self) -> None:
        """Detach from the server. Requests in flight fail with ENOTCONN."""


class Queue:
    """One virtqueue, its slots, and the threads that wait on them.

    One waiting thread at a time sleeps on the call descriptor and collects for all; the others wait for it.

    Args:
        front_end: the connected device.
        index: the queue's number; 0 is hiprio.
        ring: the memory of the queue.
        timeout: seconds to wait for a slot or a reply.
    """

    def __init__(self, front_end: FrontEnd, index: int, ring: Ring, timeout: float) -> None:
        self._front_end = front_end
        self._index = index
        self._ring = ring
        self._timeout = timeout
        self._doorbells = front_end.start_queue(index, ring.size, ring.descriptors, ring.available, ring.used)
        self._condition = threading.Condition()
        self._free = list(range(ring.slots))
        self._lengths: dict[int, int] = {}
        self._abandoned: set[int] = set()
        self._sleeper = False
        self._failure: tuple[int, str] | None = None
        self._poll = select.poll()
        self._poll.register(self._doorbells.call, select.POLLIN)
        self._poll.register(front_end.fileno(), select.POLLRDHUP)

    def exchange(self, header: bytes, arguments: bytes, data: Buffer, reply_bytes: int) -> bytes:
        """As Transport.exchange()."""
        with self._condition:
            slot = self._send(header, arguments, data, reply_bytes)
            try:
                self._wait(lambda: slot in self._lengths)
                return self._ring.reply(slot, self._lengths[slot])
            finally:
                self._release(slot)

    def post(self, header: bytes, arguments: bytes) -> None:
        """As Transport.post()."""
        with self._condition:
            slot = self._send(header, arguments, b"", 0)
            self._abandoned.add(slot)

    def fail(self, code: int, reason: str) -> None:
        """Let every request in flight, and every later one, fail with this errno."""
        with self._condition:
            self._failure = self._failure or (code, reason)
            self._condition.notify_all()
            while self._sleeper:
                os.eventfd_write(self._doorbells.call, 1)
                self._condition.wait(0.1)

    def stop(self) -> None:
        """End the queue in the device, if that still answers, and let go of the memory."""
        with self._condition:
            try:
                self._front_end.stop_queue(self._index)
            except (OSError, UserError, ProtocolError):
                # A dead device uses no queue.
                return
            finally:
                self._ring.close()

    def _send(self, header: bytes, arguments: bytes, data: Buffer, reply_bytes: int) -> int:
        self._collect()
        if not self._free:
            self._wait(lambda: bool(self._free))
        if self._failure:
            raise OSError(*self._failure)
        slot = self._free.pop()
        try:
            self._ring.place(slot, header, arguments, data, reply_bytes)
        except BaseException:
            self._free.append(slot)
            raise
        if self._ring.publish(slot):
            os.eventfd_write(self._doorbells.kick, 1)
        return slot

    def _release(self, slot: int) -> None:
        if self._lengths.pop(slot, None) is None:
            # Its memory still belongs to the device, which may answer late.
            self._abandoned.add(slot)
        else:
            self._free.append(slot)
            self._condition.notify()

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout
        while not ready():
            if self._failure:
                raise OSError(*self._failure)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise OSError(errno.ETIMEDOUT, f"the virtio-fs device did not answer in {self._timeout:g} s")
            if self._sleeper:
                self._condition.wait(remaining)
            elif self._ring.arm():
                self._collect()
            else:
                self._sleep(remaining)

    def _sleep(self, seconds: float) -> None:
        self._sleeper = True
        self._condition.release()
        try:
            events = dict(self._poll.poll(seconds * 1000))
        finally:
            self._condition.acquire()
            self._sleeper = False
            self._condition.notify_all()
        if self._doorbells.call in events:
            os.eventfd_read(self._doorbells.call)
        self._collect()
        if self._front_end.fileno() in events:
            self._failure = self._failure or (errno.ENOTCONN, "the virtio-fs device is gone")

    def _collect(self) -> None:
        if self._failure:
            return
        try:
            ended = self._ring.reap()
        except OSError as error:
            self._failure = (errno.EIO, error.strerror or "broken ring")
            return
        for slot, length in ended:
            if slot in self._abandoned:
                self._abandoned.discard(slot)
                self._free.append(slot)
            else:
                self._lengths[slot] = length
        if ended:
            self._condition.notify_all()


class VirtioTransport:
    """FUSE messages over a virtio-fs device: queue 0 for what has no reply, the others in turn for the rest.

    Args:
        socket_path: the back-end's vhost-user socket.
        timeout: seconds to wait for a reply.
        request_queues: how many request queues to use; the device may have fewer.
        window: whether to have files mapped, where the device offers that.

    Raises:
        UserError: there is no back-end, or it is no virtio-fs device; and as FrontEnd says.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        *,
        timeout: float = 30.0,
        request_queues: int = 1,
        window: bool = False,
    ) -> None:
        slot_bytes = MAX_DATA + OVERHEAD
        memory_size = (2 + request_queues) * (1 << 20) + request_queues * SLOTS * 2 * slot_bytes
        protocol_features = PROTOCOL_FEATURES | WINDOW_FEATURES if window else PROTOCOL_FEATURES
        self._front_end = FrontEnd(socket_path, memory_size, timeout=timeout, protocol_features=protocol_features)
        self._queues: list[Queue] = []
        features = self._front_end.features
        end = 0
        try:
            for index in range(1 + min(request_queues, self._front_end.num_request_queues)):
                size = slot_bytes if index else HIPRIO_BYTES
                ring = Ring(
                    self._front_end.memory,
                    end,
                    SLOTS,
                    size,
                    size,
                    bool(features & VIRTIO_RING_F_INDIRECT_DESC),
                    bool(features & VIRTIO_RING_F_EVENT_IDX),
                )
                end = ring.end
                self._queues.append(Queue(self._front_end, index, ring, timeout))
        except BaseException:
            self.close()
            raise
        self._hiprio = self._queues[0]
        self._turn = itertools.cycle(self._queues[1:])

    @property
    def max_data(self) -> int:
        """As Transport.max_data."""
        return MAX_DATA

    @property
    def tag(self) -> str:
        """The tag of the device's configuration space; empty where it offers none."""
        return self._front_end.tag

    @property
    def window(self) -> Window | None:
        """Where the device has files mapped; None if it does not do that."""
        return self._front_end.window

    def exchange(self, header: bytes, arguments: bytes, data: Buffer, reply_bytes: int) -> bytes:
        """As Transport.exchange()."""
        return next(self._turn).exchange(header, arguments, data, max(reply_bytes, OUT_HEADER.size))

    def post(self, header: bytes, arguments: bytes) -> None:
        """As Transport.post()."""
        self._hiprio.post(header, arguments)

    def close(self) -> None:
        """As Transport.close()."""
        for queue in self._queues:
            queue.fail(errno.ENOTCONN, "the virtio-fs device was closed")
        for queue in self._queues:
            queue.stop()
        self._queues = []
        self._front_end.close()
