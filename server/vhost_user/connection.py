"""One end of a vhost-user connection: whole messages in and out of a Unix stream socket."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence

from coherent_vfs.server.vhost_user.messages import (
    HEADER_SIZE,
    MAX_FDS,
    VERSION,
    HeaderFlag,
    Message,
    ProtocolError,
    pack_header,
    unpack_header,
)

_FD_SIZE = 4


class Disconnected(Exception):
    """The peer closed the connection between two messages, as it may."""


class ConnectionLost(ProtocolError):
    """The peer is gone, as far as the socket can tell, in the middle of something."""


class Connection:
    """Messages over a connected AF_UNIX stream socket, which it owns and makes non-blocking.

    Both sides of the protocol use it. It never waits for a message, and only so long for a peer that does
    not read: a back-end must go on serving its rings.

    Args:
        sock: the connected socket.
        send_timeout: seconds that a send may wait for a peer that does not read.
    """

    def __init__(self, sock: socket.socket, *, send_timeout: float = 1.0) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._send_timeout = send_timeout
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._header: tuple[int, int, int] | None = None

    def fileno(self) -> int:
        """The socket's descriptor, to wait for input on."""
        return self._socket.fileno()

    def receive(self) -> Message | None:
        """The next whole message with the descriptors that came with it, or None until more arrives.

        Whatever arrived of an unfinished message is kept for the next call.

        Raises:
            Disconnected: end of the stream between messages.
            ProtocolError: end of the stream within a message, another version, too long, too many
                descriptors, or the connection broke.
        """
        # Never more is read than belongs to this message: its descriptors must not mix with the next one's.
        if self._header is None:
            if not self._fill(HEADER_SIZE):
                return None
            self._header = unpack_header(bytes(self._buffer))
            self._buffer.clear()
        request, flags, size = self._header
        if not self._fill(size):
            return None
        message = Message(request, flags, bytes(self._buffer), self._fds)
        self._buffer.clear()
        self._fds = []
        self._header = None
        return message

    def _fill(self, size: int) -> bool:
        """Read until the buffer holds `size` bytes; False when they have not all arrived yet."""
        while len(self._buffer) < size:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    size - len(self._buffer),
                    socket.CMSG_SPACE(MAX_FDS * _FD_SIZE),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return False
            except OSError as error:
                raise ConnectionLost(f"connection lost: {error.strerror}") from error
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    whole = len(content) // _FD_SIZE * _FD_SIZE
                    self._fds.extend(memoryview(content[:whole]).cast("i"))
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise ProtocolError(f"more than {MAX_FDS} file descriptors in one message")
            if not data:
                if self._buffer or self._header is not None:
                    raise ConnectionLost("connection closed in the middle of a message")
                raise Disconnected
            self._buffer += data
        return True

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> None:
        """Send one message. `fds` stay the caller's.

        Args:
            request: the request's number, or that of the request which is answered.
            payload: the payload's bytes.
            fds: descriptors to pass along.
            flags: HeaderFlag bits besides the version.

        Raises:
            ProtocolError: the peer is gone, or did not read for `send_timeout` seconds.
        """
        rest = memoryview(pack_header(request, VERSION | flags, len(payload)) + payload)
        deadline = time.monotonic() + self._send_timeout
        while rest:
            try:
                sent = socket.send_fds(self._socket, [rest], list(fds)) if fds else self._socket.send(rest)
            except BlockingIOError:
                self._wait_until_writable(deadline)
                continue
            except OSError as error:
                raise ConnectionLost(f"connection lost: {error.strerror}") from error
            rest = rest[sent:]
            fds = ()

    def _wait_until_writable(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise ProtocolError("the peer does not read what it is sent")

    def reply(self, message: Message, payload: bytes) -> None:
        """Answer `message`. Raises what `send` raises."""
        self.send(message.request, payload, flags=HeaderFlag.REPLY)

    def close(self) -> None:
        """Close the socket and the descriptors of an unfinished message."""
        while self._fds:
            os.close(self._fds.pop())
        self._socket.close()
