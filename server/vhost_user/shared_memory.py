"""The device's shared memory region: we ask the front-end to map files there, and to take them away again.

Follows QEMU's docs/interop/vhost-user.rst (SHMEM_MAP, SHMEM_UNMAP) and virtio 1.2, 2.10. The requests go over
the channel that the front-end gave us for them, and are answered there, in order. Nothing here waits: while
it maps a file, QEMU asks things of its own on the main connection, and answers only after those.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from coherence.log import get_logger
from server.vhost_user.connection import Connection, ConnectionLost, Disconnected
from server.vhost_user.messages import (
    BackendRequest,
    HeaderFlag,
    Message,
    ProtocolError,
    SharedMapping,
    pack_shared_mapping,
    unpack_u64,
)

_log = get_logger(__name__)

TIMEOUT: Final = 5.0
"""Seconds that the front-end has to answer a request."""
IN_FLIGHT: Final = 16
"""Requests sent and not answered yet; so few that the channel takes them all at once."""
MIN_WINDOW: Final = 2 << 20
_OFFSET_MAX: Final = (1 << 63) - 1

Done = Callable[[int], object]


class Loop(Protocol):
    """What it needs of server.loop.EventLoop."""

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...
    def call_later(self, seconds: float, callback: Callable[[], object]) -> None: ...


@dataclass
class _Pending:
    """A request; it owns `fd` until it is sent. Without `done` it was given up, and its answer is awaited still."""

    number: BackendRequest
    mapping: SharedMapping
    fd: int | None
    done: Done | None
    deadline: float

    def send(self, connection: Connection) -> None:
        fds = [] if self.fd is None else [self.fd]
        connection.send(self.number, pack_shared_mapping(self.mapping), fds, flags=HeaderFlag.NEED_REPLY)
        self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class SharedMemory:
    """The region as its device sees it. It outlives front-ends, which come by connect().

    `done` of map() and unmap() is called once, from the loop and never before they return, with 0 when the
    front-end has done it, or

    - EINVAL: not possible, or refused by the front-end; nothing has changed;
    - EIO: no answer in time, or no channel. A map() is undone should it happen yet, an unmap() happens when the
      front-end goes on: nothing needs to be asked again;
    - ECONNRESET: the device was reset or the front-end has gone, and all mappings with it.

    Args:
        size: bytes of the region: 0, or a power of two from 2 MiB.
        loop: calls back when there is something to read, and after a time.
        timeout: seconds that the front-end has to answer.
    """

    on_reset: Callable[[], object]
    """Called when all mappings have vanished, after the `done` of what was pending."""

    def __init__(self, size: int, loop: Loop, *, timeout: float = TIMEOUT) -> None:
        if size and (size < MIN_WINDOW or size & (size - 1)):
            raise ValueError(f"a window of {size} bytes: it must be a power of two from {MIN_WINDOW}")
        self.size = size
        self.on_reset = lambda: None
        self._loop = loop
        self._timeout = timeout
        self._connection: Connection | None = None
        self._sent: deque[_Pending] = deque()
        self._waiting: deque[_Pending] = deque()
        self._leftover: list[SharedMapping] = []
        """Mapped by requests that were given up."""
        self._watched = False
        self._silent = False

    @property
    def connected(self) -> bool:
        """Whether there is a front-end that maps files."""
        return self._connection is not None

    def connect(self, fd: int) -> None:
        """Ask at this connected stream socket, which now belongs to us, and no longer at the one before.

        Raises:
            OSError: it is no such socket.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise
        self._disconnect(errno.EIO)
        connection = Connection(sock, send_timeout=0)
        try:
            self._loop.add_reader(fd, self._receive)
        except OSError:
            connection.close()
            raise
        self._connection = connection

    def map(self, fd: int, file_offset: int, place: int, length: int, writable: bool, done: Done) -> None:
        """Map a piece of a file, where nothing is mapped yet.

        QEMU wants `fd` open for reading and writing whatever `writable` says, and a file that reaches to
        file_offset + length; an empty one it extends.

        Args:
            fd: the file; it stays the caller's, who may close it at once.
            file_offset: where the piece begins in the file, bytes, a multiple of the page size.
            place: where it goes in the region, bytes, a multiple of the page size.
            length: bytes, a multiple of the page size.
            writable: whether the guest may store there.
            done: see above.
        """
        if file_offset < 0 or file_offset + length > _OFFSET_MAX:
            self._fail(done, errno.EINVAL)
            return
        try:
            duplicate = os.dup(fd)
        except OSError as error:
            self._fail(done, error.errno or errno.EIO)
            return
        mapping = SharedMapping(place, length, file_offset, writable)
        self._submit(BackendRequest.SHMEM_MAP, mapping, duplicate, done)

    def unmap(self, place: int, length: int, done: Done) -> None:
        """Take away exactly what one map() has mapped there; QEMU refuses a part of it, or several at once.

        Args:
            place: as given to map().
            length: as given to map().
            done: see above.
        """
        self._submit(BackendRequest.SHMEM_UNMAP, SharedMapping(place, length), None, done)

    def reset(self) -> None:
        """The device was reset: there are no mappings any more."""
        self._give_up(errno.ECONNRESET)
        self.on_reset()

    def disconnect(self) -> None:
        """The front-end has gone."""
        self._disconnect(errno.ECONNRESET)

    def _submit(self, number: BackendRequest, mapping: SharedMapping, fd: int | None, done: Done) -> None:
        pending = _Pending(number, mapping, fd, done, time.monotonic() + self._timeout)
        if not (mapping.place >= 0 and mapping.length > 0 and mapping.place + mapping.length <= self.size):
            pending.close()
            self._fail(done, errno.EINVAL)
        elif self._connection is None:
            pending.close()
            self._fail(done, errno.EIO)
        else:
            self._waiting.append(pending)
            self._watch(self._timeout)
            self._send_waiting()

    def _fail(self, done: Done, error: int) -> None:
        self._loop.call_later(0, lambda: done(error))

    def _send_waiting(self) -> None:
        """Send what may be sent now.

        Nothing new as long as the answer to something that was given up is awaited: what that has mapped has to
        go before its place is used again.
        """
        if self._sent and self._sent[0].done is None:
            return
        for mapping in self._leftover:
            self._waiting.appendleft(
                _Pending(BackendRequest.SHMEM_UNMAP, mapping, None, lambda _: None, time.monotonic() + self._timeout)
            )
        self._leftover.clear()
        while self._connection is not None and self._waiting and len(self._sent) < IN_FLIGHT:
            try:
                self._waiting[0].send(self._connection)
            except ProtocolError as error:
                self._lose(error)
                return
            self._sent.append(self._waiting.popleft())

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            message = self._connection.receive()
            if message is None:
                return
            status = self._answer(message)
        except (Disconnected, ProtocolError) as error:
            self._lose(error)
            return
        answered = self._sent.popleft()
        self._silent = False
        if answered.done is not None:
            answered.done(errno.EINVAL if status else 0)
        elif answered.number is BackendRequest.SHMEM_MAP and status == 0:
            self._leftover.append(answered.mapping)
        self._send_waiting()

    def _answer(self, message: Message) -> int:
        """The number in the answer to the oldest request; ProtocolError when the message is none."""
        message.close()
        if not message.flags & HeaderFlag.REPLY or not self._sent or message.request != self._sent[0].number:
            raise ProtocolError(f"message {message.request} is no answer to what was asked")
        try:
            return unpack_u64(message.payload)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    def _lose(self, error: Exception) -> None:
        if isinstance(error, Disconnected | ConnectionLost):  # a machine that ends; its main connection tells
            _log.info("shared memory channel closed")
        else:
            _log.warning("shared memory channel dropped", reason=str(error))
        self._disconnect(errno.EIO)

    def _disconnect(self, error: int) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop.remove_reader(connection.fileno())
            connection.close()
        pending = self._give_up_all()
        self._sent.clear()
        self._leftover.clear()
        self._silent = False
        for done in pending:
            done(error)

    def _give_up(self, error: int) -> None:
        for done in self._give_up_all():
            done(error)

    def _give_up_all(self) -> list[Done]:
        """Forget what waits, and await answers only to know when they have come; whom to tell."""
        told = [pending.done for pending in (*self._sent, *self._waiting) if pending.done is not None]
        for pending in self._sent:
            pending.done = None
        while self._waiting:
            self._waiting.popleft().close()
        return told

    def _watch(self, seconds: float) -> None:
        """Look in a while whether the oldest request has been answered."""
        if not self._watched:
            self._watched = True
            self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._watched = False
        oldest = next((pending for pending in (*self._sent, *self._waiting) if pending.done is not None), None)
        if oldest is None:
            return
        left = oldest.deadline - time.monotonic()
        if left > 0:
            self._watch(left)
            return
        if not self._silent:
            _log.warning("front-end does not answer", request=oldest.number.name, seconds=self._timeout)
            self._silent = True
        self._give_up(errno.EIO)
