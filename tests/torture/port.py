"""The side channel between the host and an actor in a guest: requests for many contexts at once over one stream."""

from __future__ import annotations

import asyncio
import collections
import os
import socket
import tty
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.torture.actions import REPLY, Action, Result, Watch, decode_results, encode_request

_UNDER_WAY = 3000
"""Bytes that may be under way to a guest: a serial line of User-Mode Linux stalls for ever when its 4096 are full."""
_CONNECT_SECONDS = 10.0
_NUDGE_SECONDS = 0.02
"""After this, a guest that has not taken all that was sent is sent something more: a serial line of User-Mode Linux
sometimes does not notice that something came."""
_NOBODY = 65535


class Lost(Exception):
    """The guest or its backend has ended: the answer will never come."""


class Port:
    """The host's end of a guest's second port; made before the guest, which is told of it by `machine`.

    Args:
        kind: "qemu" (a virtio-serial port) or "uml" (a serial line on a pseudo terminal).
        folder: For a socket.

    Attributes:
        machine: Arguments of tests.lab.guest.boot.
        device: The port's path in the guest.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self._listener: socket.socket | None = None
        self._terminal = -1
        if kind == "qemu":
            path = folder / "port.sock"
            path.unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            device = ["-chardev", f"socket,id=torture,path={path}"]
            device += ["-device", "virtserialport,chardev=torture,name=torture"]
            self.machine: dict[str, Any] = {"extra": device}
            self.device = "/dev/vport0p2"
        else:
            self._fd, self._terminal = os.openpty()
            tty.setraw(self._terminal)
            self.machine = {"append": f"ssl1=tty:{os.ttyname(self._terminal)}"}
            self.device = "/dev/ttyS1"

    def connect(self) -> int:
        """The descriptor of the stream, once the guest runs."""
        if self._listener is not None:
            self._listener.settimeout(_CONNECT_SECONDS)
            connection, _ = self._listener.accept()
            self._listener.close()
            self._fd = connection.detach()
        os.set_blocking(self._fd, False)
        return self._fd

    def close(self) -> None:
        """Close what connect() did not give away; not before the guest has ended."""
        if self._terminal >= 0:
            os.close(self._terminal)


class Actor:
    """Asks the actor in one guest.

    Args:
        fd: The stream; taken over.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._input = bytearray()
        self._sent = 0
        self._consumed = 0
        self._queue: collections.deque[bytes] = collections.deque()
        self._answers: dict[int, asyncio.Future[list[Result]]] = {}
        self._lost = ""
        self.ready = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, self._read)
        asyncio.get_running_loop().call_later(_NUDGE_SECONDS, self._nudge)

    async def ask(self, context: int, actions: Sequence[Action | Watch]) -> list[Result]:
        """Let a context do actions, one after the other.

        Args:
            context: A number; one request at a time.
            actions: At most 64, and 2000 bytes.

        Raises:
            Lost: The guest has ended before it answered.
        """
        if self._lost:
            raise Lost(self._lost)
        answer = asyncio.get_running_loop().create_future()
        self._answers[context] = answer
        self._queue.append(encode_request(context, actions))
        self._write()
        results: list[Result] = await answer
        if len(results) != len(actions):
            raise RuntimeError(f"{len(results)} results of {len(actions)} actions")
        return results

    def __str__(self) -> str:
        """What is under way, for people."""
        awaited = sorted(context for context, answer in self._answers.items() if not answer.done())
        bytes_ = f"{self._sent - self._consumed} bytes under way, {len(self._queue)} requests not sent"
        return f"answers awaited of contexts {awaited}, {bytes_}, {len(self._input)} bytes of an answer read"

    def lose(self, why: str) -> None:
        """Give up: every answer that is waited for is lost."""
        if self._lost:
            return
        self._lost = why
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Lost(why))

    def _nudge(self) -> None:
        if self._lost:
            return
        if self._sent != self._consumed and not self._queue:
            self._queue.append(encode_request(_NOBODY, []))
            self._write()
        asyncio.get_running_loop().call_later(_NUDGE_SECONDS, self._nudge)

    def _write(self) -> None:
        while self._queue and self._sent - self._consumed + len(self._queue[0]) <= _UNDER_WAY:
            frame = self._queue.popleft()
            if os.write(self._fd, frame) != len(frame):
                raise RuntimeError("the port is full")
            self._sent += len(frame)

    def _read(self) -> None:
        try:
            piece = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.lose("the guest's port is closed")
            return
        self._input += piece
        while len(self._input) >= REPLY.size:
            size, context, consumed = REPLY.unpack_from(self._input)
            end = REPLY.size + size
            if len(self._input) < end:
                break
            results = decode_results(bytes(self._input[REPLY.size : end]))
            del self._input[:end]
            self._consumed += (consumed - self._consumed) & 0xFFFFFFFF
            self.ready.set()
            if context != _NOBODY and not self._answers[context].done():
                self._answers[context].set_result(results)
        self._write()
