"""The daemon's socket files: who else listens there, who may connect, and a stale one from a killed daemon."""

from __future__ import annotations

import grp
import os
import select
import socket
import stat
from pathlib import Path

from coherent_vfs.coherence.common.errors import UserError


def open_listener(
    path: Path, mode: int, group: str | None, kind: int = socket.SOCK_SEQPACKET, option: str = "--socket"
) -> socket.socket:
    """Listen at the path, removing what a killed daemon left there.

    Args:
        path: of the socket; its directory is made if it is missing.
        mode: permission bits of the socket.
        group: its group's name or number, None for the daemon's own.
        kind: of the socket.
        option: by which a user names the path.

    Raises:
        UserError: another process listens there, something else is there, or it is not permitted.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_stale(path, kind, option)
        # Nobody may connect before mode and group are right.
        umask = os.umask(0o777)
        try:
            sock.bind(str(path))
        finally:
            os.umask(umask)
        permit(path, mode, group)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise UserError(f"socket {path}: {error.strerror or error}: choose another with {option}") from None
    except UserError:
        sock.close()
        raise
    return sock


def is_shut_down(listener: socket.socket) -> bool:
    """Whether nobody can connect to a listening socket any more. It is readable for ever then, and accept(2) may give
    EAGAIN for ever (unix_accept() of the kernel), so whoever waits for it has to stop."""
    poll = select.poll()
    poll.register(listener, 0)
    return bool(poll.poll(0))


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


def _remove_stale(path: Path, kind: int, option: str) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(f"{path} exists and is no socket: remove it, or choose another with {option}")
    except FileNotFoundError:
        return
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
