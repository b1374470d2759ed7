"""The front-end's side of vhost-user: what a virtual machine monitor does to attach a virtio-fs device.

Follows QEMU's docs/interop/vhost-user.rst and virtio 1.2, 5.11 (file system device).
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.guest.window import Window
from coherent_vfs.guest.window_channel import WindowChannel
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.messages import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    Config,
    HeaderFlag,
    MemoryRegion,
    Message,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
    pack_config,
    pack_memory_table,
    pack_single_region,
    pack_u64,
    pack_vring_address,
    pack_vring_state,
    unpack_config,
    unpack_shmem_config,
    unpack_u64,
    unpack_vring_state,
)

USER_ADDRESS = 0x7000_0000_0000
"""The user address that we claim for offset 0 of guest memory; its guest address is 0."""

FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX
"""Virtio features that a driver built on this may use."""

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)

WINDOW_NEEDS = ProtocolFeature.SHMEM | ProtocolFeature.BACKEND_REQ | ProtocolFeature.BACKEND_SEND_FD
"""Protocol features without which no files can be mapped in a window."""

WINDOW_FEATURES = WINDOW_NEEDS | ProtocolFeature.SHMEM_REPLACE
"""Protocol features that it takes besides to have that."""

_FS_CONFIG = struct.Struct("<36sI")
"""struct virtio_fs_config: tag, num_request_queues."""


class RequestFailed(OSError):
    """The backend answered that it could not do what it was asked. errno is EIO."""


@dataclass(frozen=True)
class QueueDoorbells:
    """Two non-blocking eventfds of a started queue; they belong to the FrontEnd.

    Write 1 to `kick` when buffers were made available; `call` becomes readable when some were used.
    """

    kick: int
    call: int


class FrontEnd:
    """A connection to a backend, and the guest memory that it shares with it.

    Everything a ring holds is addressed by guest addresses, and those are offsets in `memory`. Once it is
    connected, every method raises OSError: ENOTCONN when the backend is gone or breaks the protocol,
    ETIMEDOUT when it does not answer, RequestFailed when it refuses.

    Args:
        socket_path: where the backend listens.
        memory_size: bytes of guest memory, a multiple of the page size.
        timeout: seconds to wait for any answer of the backend.
        features: virtio features to accept where they are offered.
        protocol_features: protocol features to accept where they are offered.

    Raises:
        UserError: there is no backend, it does not answer, or it is no virtio-fs device.
    """

    memory: mmap.mmap
    """Guest memory, writable. It stays mapped until the last view of it is gone, also after close()."""
    memory_fd: int
    """The memfd of guest memory."""
    features: int
    """Virtio features negotiated."""
    protocol_features: ProtocolFeature
    """Protocol features negotiated."""
    tag: str
    """The share's tag, from the configuration space."""
    num_request_queues: int
    """Request queues on offer; their indices begin at 1, queue 0 is the high-priority queue."""
    window: Window | None
    """Where the backend has files mapped; None where WINDOW_NEEDS are not wanted or not offered. Another one
    after reconnect(); nothing is mapped in it after reset()."""

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        memory_size: int,
        timeout: float = 10.0,
        *,
        features: int = FEATURES,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
    ) -> None:
        self._socket_path = os.fspath(socket_path)
        self._timeout = timeout
        self._wanted_features = features
        self._wanted_protocol_features = protocol_features
        self._doorbells: dict[int, QueueDoorbells] = {}
        self._channel: WindowChannel | None = None
        self._connection = self._connect()
        try:
            self.memory_fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
            try:
                os.ftruncate(self.memory_fd, memory_size)
                self.memory = mmap.mmap(self.memory_fd, memory_size)
                self._negotiate()
            except BaseException:
                self._close_channel()
                os.close(self.memory_fd)
                raise
        except BaseException:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """The socket to the backend, to poll for its end; another one after reconnect()."""
        return self._connection.fileno()

    def start_queue(self, index: int, size: int, desc: int, avail: int, used: int, base: int = 0) -> QueueDoorbells:
        """Start and enable a queue whose rings lie in `memory` and are initialised.

        Args:
            index: 0 for the high-priority queue, 1 and up for request queues.
            size: descriptors, a power of two.
            desc: offset of the descriptor table, a multiple of 16 (so avail of 2 and used of 4).
            avail: offset of the available ring.
            used: offset of the used ring.
            base: index in the available ring where the backend begins.
        """
        if index in self._doorbells:
            raise ValueError(f"queue {index} is started already")
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        doorbells = QueueDoorbells(kick=os.eventfd(0, flags), call=os.eventfd(0, flags))
        self._doorbells[index] = doorbells
        address = VringAddress(index, USER_ADDRESS + desc, USER_ADDRESS + used, USER_ADDRESS + avail)
        try:
            self.tell(Request.SET_VRING_NUM, pack_vring_state(VringState(index, size)))
            self.tell(Request.SET_VRING_BASE, pack_vring_state(VringState(index, base)))
            self.tell(Request.SET_VRING_ADDR, pack_vring_address(address))
            self.tell(Request.SET_VRING_CALL, pack_u64(index), [doorbells.call])
            self.tell(Request.SET_VRING_KICK, pack_u64(index), [doorbells.kick])
            self.tell(Request.SET_VRING_ENABLE, pack_vring_state(VringState(index, 1)))
        except BaseException:
            self._close_doorbells(index)
            raise
        return doorbells

    def stop_queue(self, index: int) -> int:
        """Stop a queue, close its doorbells, and return the `base` to start it with again."""
        reply = self.ask(Request.GET_VRING_BASE, pack_vring_state(VringState(index, 0)))
        self._close_doorbells(index)
        return unpack_vring_state(reply).num

    def reset(self) -> None:
        """Reset the device as a guest's reboot does. Every queue stops; guest memory stays."""
        self.tell(Request.RESET_DEVICE)
        if self.window is not None:
            self.window.clear()
        self._close_all_doorbells()
        self._accept_features()

    def reconnect(self) -> None:
        """Attach to the backend again, the same or a restarted one. Every queue has to be started anew.

        Raises:
            UserError: as when it is made.
        """
        self._close_channel()
        self._connection.close()
        self._close_all_doorbells()
        self._connection = self._connect()
        self._negotiate()

    def close(self) -> None:
        """Detach from the backend, which then drops everything it holds for us. May be called twice."""
        self._close_channel()
        self._connection.close()
        self._close_all_doorbells()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """The payload that the backend replies to a request which has a reply of its own."""
        self._send(request, payload)
        return self._reply(request).payload

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Make a request that has no reply, and wait until it is done if the backend acknowledges."""
        if not self.protocol_features & ProtocolFeature.REPLY_ACK:
            self._send(request, payload, fds)
            return
        self._send(request, payload, fds, HeaderFlag.NEED_REPLY)
        if unpack_u64(self._reply(request).payload):
            raise RequestFailed(errno.EIO, f"the backend at {self._socket_path} refused {request.name}")

    def _send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        try:
            self._connection.send(request, payload, fds, flags=flags)
        except ProtocolError as error:
            raise self._gone(str(error)) from None

    def _reply(self, request: Request) -> Message:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        deadline = time.monotonic() + self._timeout
        try:
            while (message := self._connection.receive()) is None:
                if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"no answer from the backend at {self._socket_path} within {self._timeout:g} s: "
                        "does another front-end use it?",
                    )
        except Disconnected:
            raise self._gone("connection closed") from None
        except ProtocolError as error:
            raise self._gone(str(error)) from None
        message.close()
        if message.request != request or not message.flags & HeaderFlag.REPLY:
            raise self._gone(f"{message.name} came in reply to {request.name}")
        return message

    def _gone(self, reason: str) -> ConnectionError:
        return ConnectionError(errno.ENOTCONN, f"lost the backend at {self._socket_path}: {reason}")

    def _connect(self) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timeout)
            sock.connect(self._socket_path)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            raise UserError(f"no backend at {self._socket_path}: start vfs-backend") from None
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
            raise UserError(f"cannot connect to {self._socket_path}: {reason}") from None
        return Connection(sock, send_timeout=self._timeout)

    def _negotiate(self) -> None:
        try:
            self._agree_on_features()
            self._read_config()
            self._send_memory()
            self._open_window()
        except OSError as error:
            raise UserError(error.strerror) from None
        except ValueError as error:
            raise UserError(f"the backend at {self._socket_path} does not speak vhost-user: {error}") from None

    def _agree_on_features(self) -> None:
        self.protocol_features = ProtocolFeature(0)
        self._send(Request.SET_OWNER)
        offered = unpack_u64(self.ask(Request.GET_FEATURES))
        if not offered & VHOST_USER_F_PROTOCOL_FEATURES:
            raise UserError(f"the backend at {self._socket_path} is no virtio-fs device")
        protocol_offered = ProtocolFeature(unpack_u64(self.ask(Request.GET_PROTOCOL_FEATURES)))
        accepted = protocol_offered & self._wanted_protocol_features
        if not accepted & ProtocolFeature.CONFIG:
            raise UserError(f"the backend at {self._socket_path} has no configuration space")
        self._send(Request.SET_PROTOCOL_FEATURES, pack_u64(accepted))
        self.protocol_features = accepted
        self.features = offered & self._wanted_features
        self._accept_features()

    def _accept_features(self) -> None:
        self.tell(Request.SET_FEATURES, pack_u64(self.features | VHOST_USER_F_PROTOCOL_FEATURES))

    def _read_config(self) -> None:
        reply = self.ask(Request.GET_CONFIG, pack_config(Config(0, bytes(_FS_CONFIG.size))))
        if not reply:
            raise UserError(f"the backend at {self._socket_path} is no virtio-fs device")
        data = unpack_config(reply).data
        if len(data) != _FS_CONFIG.size:
            raise ValueError(f"configuration space of {len(data)} bytes")
        tag, self.num_request_queues = _FS_CONFIG.unpack(data)
        self.tag = tag.rstrip(b"\0").decode(errors="surrogateescape")

    def _send_memory(self) -> None:
        region = MemoryRegion(guest_addr=0, size=len(self.memory), user_addr=USER_ADDRESS, mmap_offset=0)
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            self.tell(Request.ADD_MEM_REG, pack_single_region(region), [self.memory_fd])
        else:
            self.tell(Request.SET_MEM_TABLE, pack_memory_table([region]), [self.memory_fd])

    def _open_window(self) -> None:
        self.window = None
        if self.protocol_features & WINDOW_NEEDS != WINDOW_NEEDS:
            return
        sizes = unpack_shmem_config(self.ask(Request.GET_SHMEM_CONFIG))
        if not sizes or not sizes[0]:
            return
        self.window = Window(sizes[0])
        ours, theirs = socket.socketpair()
        replaces = ProtocolFeature.SHMEM_REPLACE in self.protocol_features
        self._channel = WindowChannel(ours, self.window, replaces=replaces)
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _close_doorbells(self, index: int) -> None:
        doorbells = self._doorbells.pop(index, None)
        if doorbells is not None:
            os.close(doorbells.kick)
            os.close(doorbells.call)

    def _close_all_doorbells(self) -> None:
        for index in list(self._doorbells):
            self._close_doorbells(index)
