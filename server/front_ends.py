"""One front-end after the other: each drives the device over its own vhost-user connection.

A front-end that connects while another one is there waits. When one goes, whatever it and its guest had
goes with it, and the next one starts anew: so a virtual machine may reboot, crash, or come back.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Final, Protocol

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.common.unix_socket import is_shut_down
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.handler import Handler
from coherent_vfs.server.vhost_user.interface import Device
from coherent_vfs.server.vhost_user.messages import ProtocolError

log = get_logger(__name__)

ACCEPT_AGAIN_SECONDS: Final = 1.0
"""Until a listening socket is looked at again after descriptors or memory had run out."""
_GONE: Final = (errno.EAGAIN, errno.ECONNABORTED)
"""Errors of accept(2) that say that whoever connected has gone."""


class Loop(Protocol):
    """What it needs of server.device.event_loop.EventLoop."""

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...
    def call_later(self, seconds: float, callback: Callable[[], object]) -> None: ...


class Sessions:
    """Accepts front-ends from now on.

    Args:
        listener: a listening socket, not blocking.
        device: what they drive.
        loop: calls back when there is something to read.
        ended: called after a front-end has gone.
        lost: called once when none can connect any more, as whoever gave us the listener has shut it down. A
            front-end that is connected stays until it goes.
    """

    def __init__(
        self,
        listener: socket.socket,
        device: Device,
        loop: Loop,
        ended: Callable[[], object] = lambda: None,
        lost: Callable[[], object] = lambda: None,
    ) -> None:
        self._listener = listener
        self._device = device
        self._loop = loop
        self._ended = ended
        self._lost = lost
        self._short = False
        self._connection: Connection | None = None
        self._handler: Handler | None = None
        self._listen()

    def close(self) -> None:
        """Drop the front-end, if there is one, and accept no other."""
        if self._connection is None:
            self._loop.remove_reader(self._listener.fileno())
        else:
            self._drop(self._connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            self._not_accepted(error)
            return
        self._short = False
        self._loop.remove_reader(self._listener.fileno())
        self._connection = Connection(sock)
        self._handler = Handler(self._device, self._connection)
        self._loop.add_reader(sock.fileno(), self._receive)
        log.info("front-end connected")

    def _listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _not_accepted(self, error: OSError) -> None:
        """The listener may stay readable: then it is to be left alone, for a time or for ever."""
        if is_shut_down(self._listener):
            self._loop.remove_reader(self._listener.fileno())
            log.error("no front-end can connect any more: the listening socket was shut down")
            self._lost()
        elif error.errno not in _GONE:
            # Most likely descriptors have run out: look again when some may have been closed.
            if not self._short:
                log.warning("no front-end can be accepted: trying again every second", reason=error.strerror)
            self._short = True
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(ACCEPT_AGAIN_SECONDS, self._listen)

    def _receive(self) -> None:
        connection, handler = self._connection, self._handler
        assert connection is not None
        assert handler is not None
        try:
            # One at a time: a front-end that never stops asking keeps neither rings nor signals waiting.
            if message := connection.receive():
                handler.handle(message)
            return
        except Disconnected:
            log.info("front-end disconnected")
        except ProtocolError as error:
            log.warning("front-end dropped", reason=str(error))
        self._drop(connection)
        self._listen()
        self._ended()

    def _drop(self, connection: Connection) -> None:
        self._loop.remove_reader(connection.fileno())
        if self._handler is not None:
            self._handler.close()
        connection.close()
        self._connection = self._handler = None
