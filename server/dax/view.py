"""Views: descriptors of files that may be mapped in whole chunks, whatever the files' sizes are.

QEMU maps a file into a guest's window only where the file is as long as the mapping, or makes it longer. Guests
map chunks of 2 MiB. So QEMU gets a *view* of the file in its place: a file of a private FUSE mount, of a constant
huge size, whose pages are the real file's (FUSE passthrough, Linux >= 6.9). A partial last page and growth are
right without anybody's doing. An access beyond the page that holds the end of file is SIGBUS, as of any mapping.

Mapped pages stay when the descriptor is closed, and when the view process ends.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from typing import Final, Self

import msgspec

from server.dax.view_messages import Mounted, Show, Shown, receive, send

START_TIMEOUT: Final = 20.0
"""Seconds that the view process may take to start."""
ANSWER_TIMEOUT: Final = 5.0
"""Seconds that it may take to answer; it needs a third of a millisecond."""


class View:
    """Makes views, with the help of a process of its own that has CAP_SYS_ADMIN and no other capability.

    Begin before privileges are given up: from then on the backend needs none, and no path either. Nothing here
    raises because views are impossible: `available` says so. Not for several threads at once.

    Attributes:
        reason: why no views can be made, in a few words; None while they can.
        pid: of the view process; 0 if it could not be started.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.pid = 0
        self._mount_fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._start(theirs.fileno())
            self._begin()
        except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            self._end(f"the view process: {error}")

    @property
    def available(self) -> bool:
        """Whether views can be made."""
        return self.reason is None

    def open(self, fd: int) -> int:
        """A descriptor of a view of a file, close-on-exec; the caller's. It takes about 0.3 ms.

        Args:
            fd: of a regular file, open for reading and writing; stays the caller's.

        Raises:
            OSError: EINVAL or EBADF, it is not such a file; ELOOP, it is on a file system that is stacked on
                others too deeply; ENOTCONN, views are not available, or not any more (see `reason`); and as open(2).
        """
        if self.reason is not None:
            raise OSError(errno.ENOTCONN, self.reason)
        shown = self._show(fd)
        if shown.error:
            raise OSError(shown.error, os.strerror(shown.error))
        try:
            return os.open(shown.name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._mount_fd)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise self._gone("its mount was ended") from None
            raise

    def close(self) -> None:
        """End the view process. Views that are open or mapped stay so. May be called twice."""
        self._end("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, socket_fd: int) -> None:
        # -P: nothing is imported from the current directory.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.dax.view_process", str(socket_fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[socket_fd],
            start_new_session=True,
        )
        self.pid = self._process.pid

    def _begin(self) -> None:
        self._socket.settimeout(START_TIMEOUT)
        data, fds = receive(self._socket)
        if not data:
            # By SIGSYS, -31, where a filter of system calls lets nobody mount.
            assert self._process is not None
            self._end(f"the view process ended with status {self._process.wait(START_TIMEOUT)}")
            return
        reason = msgspec.json.decode(data, type=Mounted).reason
        if reason is not None:
            self._end(reason)
            return
        self._mount_fd = fds[0]
        self._socket.settimeout(ANSWER_TIMEOUT)
        trial = os.memfd_create("trial", os.MFD_CLOEXEC)
        try:
            os.close(self.open(trial))
        except PermissionError:
            # A container may have the capability for itself only; FUSE can be mounted with that.
            self._end("it takes the capability CAP_SYS_ADMIN of the whole machine")
        finally:
            os.close(trial)

    def _show(self, fd: int) -> Shown:
        try:
            send(self._socket, Show(), fd)
            data, _ = receive(self._socket)
        except TimeoutError:
            raise self._gone(f"no answer in {ANSWER_TIMEOUT:g} s") from None
        except ConnectionError:
            data = b""
        if not data:
            raise self._gone("it ended")
        return msgspec.json.decode(data, type=Shown)

    def _gone(self, how: str) -> OSError:
        self._end(f"the view process is gone: {how}")
        return OSError(errno.ENOTCONN, self.reason)

    def _end(self, reason: str) -> None:
        """Let no process and no descriptor remain."""
        self.reason = self.reason or reason
        self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._mount_fd >= 0:
            os.close(self._mount_fd)
            self._mount_fd = -1
