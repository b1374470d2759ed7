"""One front-end after the other: each drives the device over its own vhost-user connection.

A front-end that connects while another one is there waits. When one goes, whatever it and its guest had
goes with it, and the next one starts anew: so a virtual machine may reboot, crash, or come back.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.common.unix_socket import Acceptor, Loop
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.handler import Handler
from coherent_vfs.server.vhost_user.interface import Busy, Device
from coherent_vfs.server.vhost_user.messages import Message, ProtocolError

log = get_logger(__name__)


class FrontEnds:
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
        self._device = device
        self._loop = loop
        self._ended = ended
        self._connection: Connection | None = None
        self._handler: Handler | None = None
        self._held: Message | None = None
        """What the device is drained for; nothing else is received meanwhile."""
        self._acceptor = Acceptor(
            listener, loop, self._accepted, "front-end", "the listening socket was shut down", lost
        )
        self._acceptor.start()

    def close(self) -> None:
        """Drop the front-end, if there is one, and accept no other."""
        if self._connection is None:
            self._acceptor.stop()
        else:
            self._drop(self._connection)

    def _accepted(self, sock: socket.socket) -> None:
        self._acceptor.stop()
        self._connection = Connection(sock)
        self._handler = Handler(self._device, self._connection)
        self._loop.add_reader(sock.fileno(), self._receive)
        log.info("front-end connected")

    def _receive(self) -> None:
        connection, handler = self._connection, self._handler
        assert connection is not None
        assert handler is not None
        try:
            # One at a time: a front-end that never stops asking keeps neither rings nor signals waiting.
            message, self._held = self._held or connection.receive(), None
            if message:
                handler.handle(message)
            return
        except Busy:
            self._held = message
            self._loop.remove_reader(connection.fileno())
            self._device.drain(self._resume)
            return
        except Disconnected:
            log.info("front-end disconnected")
        except ProtocolError as error:
            log.warning("front-end dropped", reason=str(error))
        self._drop(connection)
        self._acceptor.start()
        self._ended()

    def _resume(self) -> None:
        """The device is drained: what had to wait can be handled."""
        assert self._connection is not None
        self._loop.add_reader(self._connection.fileno(), self._receive)
        self._receive()

    def _drop(self, connection: Connection) -> None:
        self._loop.remove_reader(connection.fileno())
        if self._handler is not None:
            self._handler.close()
        if self._held is not None:
            self._held.close()
        connection.close()
        self._connection = self._handler = self._held = None
