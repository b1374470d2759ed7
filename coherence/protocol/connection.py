"""One end of a control connection: whole messages, with descriptors, over SOCK_SEQPACKET."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from coherent_vfs.coherence.protocol.messages import ENCODER, Message

MAX_BYTES = 65536
MAX_FDS = 3

Received = TypeVar("Received")


class Dropped(Exception):
    """The connection is over: the peer did not keep to the protocol, or does not read."""


class Closed(Dropped):
    """The peer closed the connection, or died."""


class Full(Dropped):
    """The peer does not read: its queue is full, and the message was not sent. Later ones may be."""


class Connection(Generic[Received]):
    """A connected socket that carries one message a packet.

    Args:
        sock: a connected SOCK_SEQPACKET Unix socket, owned by this from now on.
        decoder: of the messages that the peer may send.
        fds: how many descriptors the peer may send along with a message. When 0, none enters this process.
    """

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Received], fds: int = 0) -> None:
        self._sock = sock
        self._decoder = decoder
        self.fds = fds

    def fileno(self) -> int:
        """The socket's descriptor, to wait for."""
        return self._sock.fileno()

    def has_news(self) -> bool:
        """Whether receive would have something to tell now: a message, or that there will be none."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def settimeout(self, seconds: float | None) -> None:
        """As of a socket: 0 never waits."""
        self._sock.settimeout(seconds)

    def peer(self) -> tuple[int, int]:
        """Process and user of the peer, as the kernel tells them (SO_PEERCRED)."""
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", raw)
        return pid, uid

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; never half of it. Closed when the peer is gone, Full when it does not read."""
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            self._sock.sendmsg([ENCODER.encode(message)], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise Full("it does not read its messages") from None
        except OSError as error:
            raise Closed(f"closed by the peer: {error.strerror or error}") from None

    def receive(self) -> tuple[Received, list[int]]:
        """The next message and its descriptors, which the caller then owns.

        Raises:
            BlockingIOError: there is none yet (after settimeout(0)).
            TimeoutError: there was none in time.
            Dropped: there will be none.
        """
        try:
            # Not socket.recv_fds: that one loses its flags.
            data, ancillary, flags, _ = self._sock.recvmsg(
                MAX_BYTES, socket.CMSG_SPACE(4 * self.fds) if self.fds else 0, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            raise Closed(f"closed by the peer: {error.strerror or error}") from None
        fds = [fd for _, _, rights in ancillary for fd in array("i", rights[: len(rights) & ~3])]
        try:
            if not data:
                raise Closed("closed by the peer")
            if self.fds and len(fds) + bool(flags & socket.MSG_CTRUNC) > self.fds:
                raise Dropped("too many descriptors")
            if flags & socket.MSG_TRUNC:
                raise Dropped(f"a message of more than {MAX_BYTES} bytes")
            return self._decoder.decode(data), fds
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._close_all(fds)
            raise Dropped(f"a malformed message: {error}") from None
        except Dropped:
            self._close_all(fds)
            raise

    @staticmethod
    def _close_all(fds: Sequence[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
