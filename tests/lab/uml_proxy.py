"""Stand between User-Mode Linux and a backend that its vhost-user front-end does not suit: only the control
socket is relayed, rings and memory stay shared between the two.

Usage: python -m tests.lab.uml_proxy LISTEN BACKEND [--tag TAG]

- UML sends SET_MEM_TABLE with room for two regions though it has one; the Rust virtiofsd refuses that. It
  is trimmed.
- UML needs GET_CONFIG to learn the tag; the C virtiofsd does not have it. With --tag it is answered here.

Message numbers and layouts: QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

SET_MEM_TABLE = 5
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_CONFIG = 24
F_CONFIG = 1 << 9
FLAG_REPLY = 1 << 2
_HEADER = struct.Struct("<III")
_REGION_SIZE = 32
_MAX_FDS = 8


class Peer:
    """One end of the relay: whole vhost-user messages with their descriptors."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        """Receive request, flags, payload and descriptors. Raises EOFError when the peer is gone."""
        header, fds, _, _ = socket.recv_fds(self.socket, _HEADER.size, _MAX_FDS)
        if len(header) < _HEADER.size:
            raise EOFError
        request, flags, size = _HEADER.unpack(header)
        payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
        return request, flags, payload, fds

    def send(self, request: int, flags: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message and close its descriptors here."""
        socket.send_fds(self.socket, [_HEADER.pack(request, flags, len(payload)) + payload], fds)
        for fd in fds:
            socket.close(fd)


def relay(front: Peer, back: Peer, tag: str | None) -> NoReturn:
    """Relay messages until one side hangs up: EOFError or ConnectionError.

    Args:
        front: User-Mode Linux.
        back: The backend.
        tag: Answer GET_CONFIG with this tag instead of the backend.
    """
    config = (tag or "").encode().ljust(36, b"\0") + struct.pack("<I", 1)
    with selectors.DefaultSelector() as selector:
        selector.register(front.socket, selectors.EVENT_READ)
        selector.register(back.socket, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is back.socket:
                    request, flags, payload, fds = back.receive()
                    if request == GET_PROTOCOL_FEATURES and tag is not None:
                        payload = _u64(int.from_bytes(payload, "little") | F_CONFIG)
                    front.send(request, flags, payload, fds)
                    continue
                request, flags, payload, fds = front.receive()
                if request == GET_CONFIG and tag is not None:
                    offset, size, _ = struct.unpack_from("<III", payload)
                    answer = payload[:12] + config[offset : offset + size]
                    front.send(request, flags | FLAG_REPLY, answer)
                    continue
                if request == SET_MEM_TABLE:
                    regions = int.from_bytes(payload[:4], "little")
                    payload = payload[: 8 + regions * _REGION_SIZE]
                elif request == SET_PROTOCOL_FEATURES and tag is not None:
                    payload = _u64(int.from_bytes(payload, "little") & ~F_CONFIG)
                back.send(request, flags, payload, fds)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.uml_proxy", description=__doc__)
    parser.add_argument("listen", type=Path, help="socket for User-Mode Linux")
    parser.add_argument("backend", type=Path, help="socket of the backend")
    parser.add_argument("--tag", help="answer GET_CONFIG with this tag")
    options = parser.parse_args()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
        options.listen.unlink(missing_ok=True)
        listener.bind(str(options.listen))
        listener.listen(1)
        front, _ = listener.accept()
        connection.connect(str(options.backend))
        try:
            relay(Peer(front), Peer(connection), options.tag)
        except (EOFError, ConnectionError):
            return 0


if __name__ == "__main__":
    sys.exit(main())
