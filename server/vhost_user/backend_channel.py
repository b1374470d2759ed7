"""The device's shared memory region: we ask the front-end to map files there, and to take them away again.

Follows QEMU's docs/interop/vhost-user.rst (SHMEM_MAP, SHMEM_UNMAP) and virtio 1.2, 2.10. The requests go over
the channel that the front-end gave us for them, and are answered there, in order. Nothing here waits: while
it maps a file, QEMU asks things of its own on the main connection, and answers only after those.

QEMU 11.1 answers *before* the guest's memory is as was asked: a guest that is told then may read zeros and lose
what it stores, and one whose file is truncated then may still reach it. So each request has a second one behind
it, to remove a shared object that does not exist: its answer shows that QEMU is done with the first. And it dies
of either (a null pointer, vhost_dev.vdev) while the device is stopped: then we ask nothing.
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

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.server.vhost_user.connection import Connection, ConnectionLost, Disconnected
from coherent_vfs.server.vhost_user.messages import (
    BackendRequest,
    HeaderFlag,
    Message,
    ProtocolError,
    SharedMapping,
    pack_shared_mapping,
    pack_shared_object,
    unpack_u64,
)

_log = get_logger(__name__)

TIMEOUT: Final = 5.0
"""Seconds that the front-end has for the next answer."""
IN_FLIGHT: Final = 16
"""Requests sent and not answered yet; so few that the channel takes them all at once."""
MAX_MAPPINGS: Final = 480
"""Each is guest memory to QEMU 11.1, which aborts when that has more than 512 pieces (VHOST_USER_MAX_RAM_SLOTS)."""
MIN_WINDOW: Final = CHUNK
_OFFSET_MAX: Final = (1 << 63) - 1
_NO_OBJECT: Final = pack_shared_object(bytes(16))

Done = Callable[[int], object]


class Loop(Protocol):
    """What it needs of server.device.event_loop.EventLoop."""

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
    replaced: bool = False
    """The next one goes right behind it, without anything in between, and its answer tells that this one is done."""
    status: int | None = None
    """What the front-end answered, while the answer to what is sent behind it is awaited."""

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
    guest's memory is as was asked, or

    - EINVAL: not possible, or refused by the front-end; nothing has changed;
    - ENOSPC: there are MAX_MAPPINGS already;
    - EIO: no answer in time, or no channel. A map() is undone should it happen yet, an unmap() happens when the
      front-end goes on: nothing needs to be asked again;
    - ECONNRESET: reset() or disconnect(), and all mappings have gone.

    Args:
        size: bytes of the region: 0, or a power of two from 2 MiB.
        loop: calls back when there is something to read, and after a time.
        timeout: seconds that the front-end has for the next answer.
    """

    on_reset: Callable[[], object]
    """Called by reset(), before the `done` of what was pending: nothing is to be asked any more for what it was for."""

    def __init__(self, size: int, loop: Loop, *, timeout: float = TIMEOUT) -> None:
        if size and (size < MIN_WINDOW or size & (size - 1)):
            raise ValueError(f"a window of {size} bytes: it must be a power of two from {MIN_WINDOW}")
        self.size = size
        self.on_reset = lambda: None
        self._loop = loop
        self._timeout = timeout
        self._connection: Connection | None = None
        self._shared_objects = False
        self._replaces = False
        self._mapped: dict[int, SharedMapping] = {}
        """By moffset: what the front-end has mapped, as far as we know."""
        self._sent: deque[_Pending] = deque()
        self._waiting: deque[_Pending] = deque()
        self._leftover: deque[SharedMapping] = deque()
        """What may be mapped still and has to go before anything else is sent."""
        self._since = 0.0
        """When the front-end last answered, or was asked something while it had nothing to do."""
        self._watched = False
        self._silent = False
        self._running = False

    @property
    def connected(self) -> bool:
        """Whether there is a front-end that maps files."""
        return self._connection is not None

    def connect(self, fd: int, *, shared_objects: bool = False, replaces: bool = False) -> None:
        """Ask at this connected stream socket, which now belongs to us, and no longer at the one before.

        Args:
            fd: the socket.
            shared_objects: whether the front-end has SHARED_OBJECT. One that has not is trusted to answer when it
                is done.
            replaces: whether it has SHMEM_REPLACE: then nothing is missing while one mapping replaces another.

        Raises:
            OSError: it is no such socket.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise
        connection = Connection(sock, send_timeout=0)
        try:
            self._loop.add_reader(fd, self._receive)
        except OSError:
            connection.close()
            raise
        self._disconnect(errno.EIO)
        self._connection = connection
        self._shared_objects = shared_objects
        self._replaces = replaces

    def map(self, fd: int, file_offset: int, moffset: int, length: int, writable: bool, done: Done) -> None:
        """Map a piece of a file, where nothing is mapped yet.

        QEMU wants `fd` open for reading and writing whatever `writable` says, and a file that reaches to
        file_offset + length; an empty one it extends.

        Args:
            fd: the file; it stays the caller's, who may close it at once.
            file_offset: where the piece begins in the file, bytes, a multiple of the page size.
            moffset: where it goes in the region, bytes, a multiple of the page size.
            length: bytes, a multiple of the page size.
            writable: whether the guest may store there.
            done: see above.
        """
        if file_offset < 0 or file_offset + length > _OFFSET_MAX:
            self._fail(done, errno.EINVAL)
            return
        if self._coming() >= MAX_MAPPINGS:
            self._fail(done, errno.ENOSPC)
            return
        try:
            duplicate = os.dup(fd)
        except OSError as error:
            self._fail(done, error.errno or errno.EIO)
            return
        mapping = SharedMapping(moffset, length, file_offset, writable)
        self._submit(BackendRequest.SHMEM_MAP, mapping, duplicate, done)

    def unmap(self, moffset: int, length: int, done: Done, *, replaced: bool = False) -> None:
        """Take away exactly what one map() has mapped there; QEMU refuses a part of it, or several at once.

        Args:
            moffset: as given to map().
            length: as given to map().
            done: see above.
            replaced: the next call, at once, is map() of what is to be there: there is to be as little time as
                possible without either. `done` may be called before that is so; what counts is that of the map(),
                or of the last one where several are to be there.
        """
        if replaced and self._replaces and self._connection is not None:
            self._loop.call_later(0, lambda: done(0))
            return
        self._submit(BackendRequest.SHMEM_UNMAP, SharedMapping(moffset, length), None, done, replaced)

    def reset(self) -> None:
        """Begin anew, without any mapping.

        QEMU drops the mappings when the guest resets the device, but does not tell; a driver that is bound again
        finds them still there. So they are unmapped, which is refused where they have gone already.
        """
        self._leftover.extend(self._mapped.values())
        self._mapped.clear()
        self.on_reset()
        self._give_up(errno.ECONNRESET)
        self._send()

    def start(self) -> None:
        """The device runs: the front-end may be asked."""
        if not self._running:
            self._running = True
            self._since = time.monotonic()
            self._send()

    def stop(self) -> None:
        """The device is stopped, as at the beginning: what is to be asked waits until it runs."""
        self._running = False

    def disconnect(self) -> None:
        """The front-end has gone."""
        self._disconnect(errno.ECONNRESET)

    def _submit(
        self, number: BackendRequest, mapping: SharedMapping, fd: int | None, done: Done, replaced: bool = False
    ) -> None:
        pending = _Pending(number, mapping, fd, done, replaced)
        if not (mapping.moffset >= 0 and mapping.length > 0 and mapping.moffset + mapping.length <= self.size):
            pending.close()
            self._fail(done, errno.EINVAL)
        elif self._connection is None:
            pending.close()
            self._fail(done, errno.EIO)
        else:
            if not self._oldest():
                self._since = time.monotonic()
                self._watch(self._timeout)
            self._waiting.append(pending)
            self._send()

    def _fail(self, done: Done, error: int) -> None:
        self._loop.call_later(0, lambda: done(error))

    def _send(self) -> None:
        """Send what may be sent now.

        Nothing new as long as the answer to something that was given up is awaited: what that has mapped has to
        go before its range is used again.
        """
        if self._sent and self._sent[0].done is None:
            return
        while self._running and self._connection is not None and self._has_room():
            if self._leftover:
                pending = _Pending(BackendRequest.SHMEM_UNMAP, self._leftover.popleft(), None, lambda _: None)
            elif self._waiting:
                pending = self._waiting.popleft()
            else:
                return
            self._sent.append(pending)
            try:
                pending.send(self._connection)
                if self._shared_objects and not pending.replaced:
                    number = BackendRequest.SHARED_OBJECT_REMOVE
                    self._connection.send(number, _NO_OBJECT, flags=HeaderFlag.NEED_REPLY)
            except ProtocolError as error:
                pending.close()
                self._lose(error)

    def _has_room(self) -> bool:
        return len(self._sent) < IN_FLIGHT or self._sent[-1].replaced

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
        self._silent = False
        self._since = time.monotonic()
        answered = self._sent[0]
        if answered.status is None:
            answered.status = status
            if self._shared_objects and not answered.replaced:
                return
        self._sent.popleft()
        self._finish(answered)
        self._send()

    def _answer(self, message: Message) -> int:
        """The number in the answer that is due; ProtocolError when the message is none."""
        message.close()
        due: BackendRequest | None = None
        if self._sent:
            first = self._sent[0]
            due = first.number if first.status is None else BackendRequest.SHARED_OBJECT_REMOVE
        if not message.flags & HeaderFlag.REPLY or message.request != due:
            raise ProtocolError(f"message {message.request} is no answer to what was asked")
        try:
            return unpack_u64(message.payload)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    def _finish(self, answered: _Pending) -> None:
        mapping = answered.mapping
        if answered.status == 0:
            if answered.number is BackendRequest.SHMEM_UNMAP:
                self._mapped.pop(mapping.moffset, None)
            elif answered.done is None:
                self._leftover.append(mapping)
            else:
                self._note(mapping)
        if answered.done is not None:
            answered.done(errno.EINVAL if answered.status else 0)

    def _note(self, mapping: SharedMapping) -> None:
        """It is mapped; a front-end that replaces has left what there was before and after it."""
        end = mapping.moffset + mapping.length
        for there in list(self._mapped.values()):
            there_end = there.moffset + there.length
            if there.moffset < end and mapping.moffset < there_end:
                del self._mapped[there.moffset]
                for moffset, after in ((there.moffset, mapping.moffset), (end, there_end)):
                    if moffset < after:
                        self._mapped[moffset] = SharedMapping(moffset, after - moffset)
        self._mapped[mapping.moffset] = mapping

    def _lose(self, error: Exception) -> None:
        if isinstance(error, Disconnected | ConnectionLost):  # a machine that ends; its main connection tells
            _log.info("shared memory channel closed")
        else:
            _log.warning("shared memory channel dropped", reason=str(error))
        # In the loop: `done` is never called before map() returns.
        self._disconnect(errno.EIO)

    def _disconnect(self, error: int) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop.remove_reader(connection.fileno())
            connection.close()
        told = self._forget()
        self._sent.clear()
        self._leftover.clear()
        self._mapped.clear()
        self._silent = False
        for done in told:
            self._fail(done, error)

    def _give_up(self, error: int) -> None:
        for done in self._forget():
            done(error)

    def _forget(self) -> list[Done]:
        """Forget what waits, and await answers only to know when they have come; whom to tell."""
        told = [pending.done for pending in (*self._sent, *self._waiting) if pending.done is not None]
        for pending in self._sent:
            pending.done = None
        while self._waiting:
            self._waiting.popleft().close()
        return told

    def _coming(self) -> int:
        """How many mappings there are when all that was asked is done."""
        pending = [one for one in (*self._sent, *self._waiting) if one.status is None]
        made = sum(one.number is BackendRequest.SHMEM_MAP for one in pending)
        moffsets = {one.mapping.moffset for one in pending if one.number is BackendRequest.SHMEM_UNMAP}
        return len(self._mapped) + len(self._leftover) + made - len(moffsets)

    def _oldest(self) -> _Pending | None:
        """The oldest request that somebody waits for."""
        return next((pending for pending in (*self._sent, *self._waiting) if pending.done is not None), None)

    def _watch(self, seconds: float) -> None:
        """Look in a while whether there are answers."""
        if not self._watched:
            self._watched = True
            self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._watched = False
        oldest = self._oldest()
        if oldest is None:
            return
        left = self._since + self._timeout - time.monotonic() if self._running else self._timeout
        if left > 0:
            self._watch(left)
            return
        if not self._silent:
            _log.warning("front-end does not answer", request=oldest.number.name, seconds=self._timeout)
            self._silent = True
        self._give_up(errno.EIO)
