"""Listening Unix sockets: bound with their mode and group, a stale socket file replaced, connections accepted."""

from __future__ import annotations

import errno
import grp
import os
import select
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger

log = get_logger(__name__)

BACKLOG: Final = 128
"""Connections that may wait to be accepted."""
ACCEPT_AGAIN_SECONDS: Final = 1.0
"""Pause after accept(2) has failed for want of descriptors or memory."""
_GONE: Final = (errno.EAGAIN, errno.ECONNABORTED)
"""Errors of accept(2) for a connection that has ended already."""


class Loop(Protocol):
    """An event loop, asyncio's or the backend's own."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object: ...
    def remove_reader(self, fd: int, /) -> object: ...
    def call_later(self, delay: float, callback: Callable[[], object], /) -> object: ...


class Acceptor:
    """Accepts connections in an event loop, between start() and stop().

    It pauses while descriptors or memory have run out, and ends when the listening socket is shut down.

    Args:
        listener: a listening socket, not blocking.
        loop: calls back when a connection waits.
        accepted: gets each connection's socket.
        client: the kind of program that connects, for the log.
        shut_down: the cause and the remedy to log when the listening socket is shut down.
        lost: called once, when the listening socket is shut down.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: Loop,
        accepted: Callable[[socket.socket], object],
        client: str,
        shut_down: str,
        lost: Callable[[], object] = lambda: None,
    ) -> None:
        self._listener = listener
        self._fd = listener.fileno()
        self._loop = loop
        self._accepted = accepted
        self._client = client
        self._shut_down = shut_down
        self._lost = lost
        self._short = False
        self._accepting = False
        self._paused = False

    def start(self) -> None:
        """Accept connections from now on."""
        self._accepting = True
        if not self._paused:
            self._loop.add_reader(self._fd, self._accept)

    def stop(self) -> None:
        """Leave connections waiting; start() accepts them. Before the listening socket is closed."""
        self._accepting = False
        self._loop.remove_reader(self._fd)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            self._not_accepted(error)
            return
        self._short = False
        self._accepted(sock)

    def _not_accepted(self, error: OSError) -> None:
        """The listening socket may stay readable: do not watch it for a time, or not again."""
        if _is_shut_down(self._listener):
            self.stop()
            log.error(f"no {self._client} can connect any more: {self._shut_down}")
            self._lost()
        elif error.errno not in _GONE:
            # Most likely descriptors have run out: try again when some may have been closed.
            if not self._short:
                log.warning(f"no {self._client} can be accepted: trying again every second", reason=error.strerror)
            self._short = True
            self._paused = True
            self._loop.remove_reader(self._fd)
            self._loop.call_later(ACCEPT_AGAIN_SECONDS, self._resume)

    def _resume(self) -> None:
        self._paused = False
        if self._accepting:
            self.start()


def open_listener(
    path: Path, mode: int, group: str | None, kind: int = socket.SOCK_SEQPACKET, option: str = "--socket"
) -> socket.socket:
    """Listen at the path, removing the socket file of a killed daemon.

    Args:
        path: of the socket; its directory is made if it is missing.
        mode: permission bits of the socket.
        group: its group's name or number, None for the daemon's own.
        kind: of the socket.
        option: by which a user names the path.

    Raises:
        UserError: another process listens there, something else is there, or it is not permitted.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if socket_exists(path, f"choose another with {option}"):
            _remove_stale(path, kind, option)
        return bind(path, kind, lambda: permit(path, mode, group))
    except OSError as error:
        raise UserError(f"socket {path}: {error.strerror or error}: choose another with {option}") from None


def socket_exists(path: Path, remedy: str) -> bool:
    """Whether a socket file is at the path.

    Raises:
        UserError: another kind of file is there; the message ends with the remedy.
        OSError: the path cannot be looked up.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(f"{path} exists and is no socket: remove it, or {remedy}")
    except FileNotFoundError:
        return False
    return True


def bind(path: Path, kind: int, permit: Callable[[], None], backlog: int = BACKLOG) -> socket.socket:
    """A listening socket at the path, not blocking. After an error no socket file is left.

    Args:
        path: of the socket.
        kind: of the socket.
        permit: sets the group and mode of the socket file; until then no process may connect.
        backlog: connections that may wait to be accepted.

    Raises:
        OSError: the path is taken, impossible or not permitted.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        umask = os.umask(0o777)
        try:
            sock.bind(os.fsencode(path))
        finally:
            os.umask(umask)
        try:
            permit()
            sock.listen(backlog)
        except BaseException:
            path.unlink()
            raise
    except BaseException:
        sock.close()
        raise
    return sock


def permit(path: Path, mode: int, group: str | None) -> None:
    """Give a file its group and permission bits. UserError when that cannot be done."""
    try:
        if group is not None:
            os.chown(path, -1, group_id(group))
        path.chmod(mode)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: cannot set mode {mode:04o}, group {group}") from None


def group_id(group: str) -> int:
    """The number of a group given by name or number. UserError when there is none."""
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UserError(f"no group {group}: create it, or name another with --socket-group") from None


def _is_shut_down(listener: socket.socket) -> bool:
    """Whether a listening socket was shut down. It is then readable for ever, and accept(2) may fail with EAGAIN for
    ever (unix_accept() of the kernel), so the event loop must not watch it."""
    poll = select.poll()
    poll.register(listener, 0)
    return bool(poll.poll(0))


def _remove_stale(path: Path, kind: int, option: str) -> None:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise UserError(f"socket {path}: {error.strerror or error}: use another {option}") from None
    raise UserError(f"socket {path} is in use by another process: stop it, or choose another with {option}")
