"""The host's side of the agent in a guest (agent/agent.c): frames over one stream socket."""

from __future__ import annotations

import enum
import select
import socket
import struct
import time
from collections.abc import Callable

MAGIC = 0x42414C56
_HEADER = struct.Struct("<III")
_PIECE = 2048
"""Bytes; what the agent takes at once (agent.c says why)."""
_WATCH_INTERVAL = 0.25
"""Seconds between two looks at the guest's health while its agent is silent."""


class Kind(enum.IntEnum):
    HELLO = 1
    INPUT = 2
    RUN = 3
    KILL = 4
    OUTPUT = 5
    EXIT = 6
    SCRIPT = 7
    ACK = 8


class Channel:
    """Frames to and from the agent.

    Args:
        port: The host's end.
        watch: Called when nothing came for a moment; raises when the guest can no longer answer.
    """

    def __init__(self, port: socket.socket, watch: Callable[[], None]) -> None:
        self._port = port
        self._port.setblocking(False)
        self._watch = watch

    def send(self, kind: Kind, payload: bytes, deadline: float) -> None:
        """Send one frame. Raises TimeoutError when the guest does not take it by the deadline (monotonic)."""
        frame = memoryview(_HEADER.pack(MAGIC, kind, len(payload)) + payload)
        while frame:
            self._wait(select.POLLOUT, deadline)
            frame = frame[self._port.send(frame) :]

    def send_pieces(self, kind: Kind, data: bytes, deadline: float) -> None:
        """Send data as acknowledged pieces, which the agent collects for the next RUN."""
        for start in range(0, len(data), _PIECE):
            self.send(kind, data[start : start + _PIECE], deadline)
            answer, _ = self.receive(deadline)
            if answer is not Kind.ACK:
                raise ConnectionError(f"the agent answers with {answer.name} instead of ACK")

    def receive(self, deadline: float) -> tuple[Kind, bytes]:
        """Receive one frame. Raises TimeoutError at the deadline (monotonic)."""
        magic, kind, length = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if magic != MAGIC:
            raise ConnectionError("the agent's frames are out of step")
        return Kind(kind), self._read(length, deadline)

    def wait_hello(self, deadline: float) -> None:
        """Discard what comes until the agent says that it is ready, as after a reboot."""
        hello = _HEADER.pack(MAGIC, Kind.HELLO, 0)
        seen = b""
        while not seen.endswith(hello):
            seen = seen[-len(hello) :] + self._read(1, deadline)

    def close(self) -> None:
        self._port.close()

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(select.POLLIN, deadline)
            piece = self._port.recv(size - len(data))
            if not piece:
                raise ConnectionError("the guest's port is closed")
            data += piece
        return bytes(data)

    def _wait(self, events: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._port, events)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if poll.poll(1000 * min(left, _WATCH_INTERVAL)):
                return
            self._watch()
