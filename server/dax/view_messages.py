"""What the backend and its view process say to each other, over a SOCK_SEQPACKET pair: one message per packet."""

from __future__ import annotations

import socket
from typing import Final

import msgspec

MAX_MESSAGE: Final = 1024
"""Bytes of the longest message."""


class Mounted(msgspec.Struct):
    """The view process's first message, with a descriptor of the mount, or with a reason why there is none."""

    reason: str | None = None


class Show(msgspec.Struct):
    """Backend: make a view of the file whose descriptor comes with this."""


class Shown(msgspec.Struct):
    """The view process's answer: the name of the view below the mount, or an errno."""

    name: str = ""
    error: int = 0


def send(sock: socket.socket, message: msgspec.Struct, fd: int | None = None) -> None:
    """Send a message, with a descriptor if one is given. Raises OSError."""
    socket.send_fds(sock, [msgspec.json.encode(message)], [] if fd is None else [fd])


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next message, encoded, and its descriptors, which become the caller's; b"" at the end. Raises OSError."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds
