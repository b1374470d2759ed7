"""The socket at which the virtual machine's front-end connects.

Whoever listens at PATH holds a lock on PATH.pid, as virtiofsd does: the lock, not the socket file, tells
a running backend from one that was killed, whose socket is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Final

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.unix_socket import bind, group_id, socket_exists

PATH_MAX: Final = 107
"""Longest path of a Unix socket, bytes (unix(7))."""
BACKLOG: Final = 16
"""Front-ends that may wait for the one that is connected."""
_LISTENING: Final = 0x10000
"""In the flags of /proc/net/unix: __SO_ACCEPTCON."""


class Listener:
    """A listening socket, with the files that belong to it; a context manager that closes and removes them.

    Attributes:
        socket: non-blocking.
    """

    def __init__(self, sock: socket.socket, path: Path | None = None, pid_fd: int = -1) -> None:
        self.socket = sock
        self._path = path
        self._pid_fd = pid_fd

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            _let_go(self._path, self._pid_fd)


def adopt(fd: int) -> Listener:
    """Use a socket that listens already, as systemd and libvirt pass one.

    Raises:
        UserError: it is no listening Unix stream socket.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UserError(f"--fd {fd}: {error.strerror}: pass a listening Unix socket") from None
    listens = sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()
        raise UserError(f"--fd {fd} is no listening Unix stream socket: pass one that listens")
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return Listener(sock)


def listen(path: Path, group: str | None) -> Listener:
    """Listen at a path.

    Args:
        path: of the socket.
        group: that may connect besides the user, by name or number; None for none.

    Raises:
        UserError: the path is taken, impossible, or not permitted, or there is no such group.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise UserError(f"socket path {path} is longer than {PATH_MAX} bytes: choose a shorter --socket-path")
    gid = -1 if group is None else group_id(group)
    try:
        pid_fd = _lock(path)
        try:
            if socket_exists(path, "choose another --socket-path"):
                _remove_stale(path)
            sock = bind(path, socket.SOCK_STREAM, lambda: _permit(path, gid), BACKLOG)
        except BaseException:
            _let_go(path, pid_fd)
            raise
    except FileNotFoundError:
        raise UserError(
            f"socket {path}: no directory {path.parent}: create it, or choose another --socket-path"
        ) from None
    except OSError as error:
        raise UserError(f"socket {path}: {error.strerror}: choose another --socket-path") from None
    return Listener(sock, path, pid_fd)


def _pid_file(path: Path) -> Path:
    return path.with_name(path.name + ".pid")


def _lock(path: Path) -> int:
    """A locked descriptor of the path's pid file, with our pid in it."""
    pid_file = _pid_file(path)
    while True:
        fd = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that locked it may have removed the file after we opened it and before we had the lock.
            if os.path.samestat(os.fstat(fd), pid_file.stat()):
                os.ftruncate(fd, 0)
                os.write(fd, b"%d\n" % os.getpid())
                return fd
            os.close(fd)
        except FileNotFoundError:
            os.close(fd)
        except BlockingIOError:
            owner = os.read(fd, 20).decode(errors="replace").strip()
            os.close(fd)
            raise UserError(
                f"socket {path} is taken by process {owner}: stop it, or choose another --socket-path"
            ) from None
        except OSError:
            os.close(fd)
            raise


def _let_go(path: Path, pid_fd: int) -> None:
    with contextlib.suppress(OSError):
        _pid_file(path).unlink()
    os.close(pid_fd)


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a killed backend. UserError when another program listens at it."""
    # Not by connecting: the program that listens would take the connection for a front-end's.
    with Path("/proc/net/unix").open("rb") as sockets:
        next(sockets)
        for line in sockets:
            _, _, _, flags, _, _, _, *name = line.split(None, 7)
            if name and int(flags, 16) & _LISTENING and _same_path(name[0].rstrip(b"\n"), path):
                raise UserError(f"socket {path} is in use by another program: stop it, or choose another --socket-path")
    path.unlink()


def _same_path(name: bytes, path: Path) -> bool:
    return name == os.fsencode(path) or name == os.fsencode(path.absolute())


def _permit(path: Path, gid: int) -> None:
    try:
        if gid >= 0:
            os.chown(path, -1, gid)
        path.chmod(0o600 if gid < 0 else 0o660)
    except OSError as error:
        raise UserError(f"socket {path}: {error.strerror}: choose another --socket-group") from None
