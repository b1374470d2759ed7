"""The channel on which a back-end asks for mappings in the guest's window, as QEMU serves it.

Follows QEMU's docs/interop/vhost-user.rst: SHMEM_MAP and SHMEM_UNMAP. Beyond that a mapping may replace others,
where that was agreed on (SHMEM_REPLACE).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading

from coherent_vfs.guest.window import Window
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.messages import (
    BackendRequest,
    Message,
    ProtocolError,
    pack_u64,
    unpack_shared_mapping,
)


class WindowChannel:
    """Serves the back-end's requests in its own thread, until the back-end hangs up or breaks the protocol.

    Args:
        sock: connected to the back-end; belongs to the channel.
        window: in which they map.
        replaces: whether a mapping may replace others.
    """

    def __init__(self, sock: socket.socket, window: Window, *, replaces: bool = False) -> None:
        self._window = window
        self._map = window.replace if replaces else window.map
        self._connection = Connection(sock)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="window", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up. Mappings stay. May be called twice."""
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
            self._stop = -1

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        try:
            while self._stop not in dict(poll.poll()):
                message = self._connection.receive()
                if message is not None:
                    self._serve(message)
        except (Disconnected, ProtocolError):
            # The main connection tells whether the back-end is gone.
            return
        finally:
            self._connection.close()

    def _serve(self, message: Message) -> None:
        try:
            self._do(message)
            status = 0
        except ValueError:
            status = errno.EINVAL
        except OSError as error:
            status = error.errno or errno.EIO
        finally:
            message.close()
        if message.need_reply:
            self._connection.reply(message, pack_u64(status))

    def _do(self, message: Message) -> None:
        """Serve a request. Raises OSError or ValueError when it is refused; then nothing has changed."""
        if message.request not in (BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP):
            raise OSError(errno.ENOSYS, "unknown request")
        mapping = unpack_shared_mapping(message.payload)
        if mapping.region != 0:
            raise OSError(errno.EINVAL, "there is one region")
        if message.request == BackendRequest.SHMEM_UNMAP:
            self._window.unmap(mapping.moffset, mapping.length)
            return
        (fd,) = message.take_fds(1)
        try:
            self._map(fd, mapping.file_offset, mapping.moffset, mapping.length, writable=mapping.writable)
        finally:
            os.close(fd)
