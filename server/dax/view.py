"""Views: descriptors of files that may be mapped in whole chunks, whatever the files' sizes are.

QEMU maps a file into a guest's window only where the file is as long as the mapping, or makes it longer. Guests
map chunks of 2 MiB. So QEMU gets a *view* of the file in its place: a file of a private FUSE mount, of a constant
huge size, whose pages are the real file's (FUSE passthrough, Linux >= 6.9). A partial last page and growth are
right without anybody's doing. An access beyond the page that holds the end of file is SIGBUS, as of any mapping.

What is mapped stays when the descriptor is closed, and when the view process ends; a view that is open can be mapped
even then, as the kernel asks the view process to open it and never again.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Self

import msgspec

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.server.dax.view_messages import Mounted, Show, Shown, receive, send

log = get_logger(__name__)

START_TIMEOUT: Final = 20.0
"""Seconds that the view process may take to start."""
ANSWER_TIMEOUT: Final = 5.0
"""Seconds that it may take to answer; it needs a third of a millisecond."""
MOST_STARTS: Final = 5
"""As often it is started anew within CRASH_SECONDS; if it ends once more there are no views any more."""
CRASH_SECONDS: Final = 60.0


class Unavailable(Exception):
    """No view process, or not any more; says why."""


class View:
    """Makes views, with the help of a process of its own that has CAP_SYS_ADMIN and no other capability.

    A process that ends is started anew, which takes the capability again. Nothing here raises because views are
    impossible: `available` says so. Not for several threads at once.

    Attributes:
        reason: why no views can be made, in a few words; None while they can.
        on_end: called when views that could be made cannot be made any more.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.on_end: Callable[[], object] = lambda: None
        self._starts: deque[float] = deque()
        self._process: ViewProcess | None = None
        try:
            self._process = ViewProcess()
        except Unavailable as problem:
            self.reason = str(problem)

    @property
    def available(self) -> bool:
        """Whether views can be made."""
        return self.reason is None

    @property
    def pid(self) -> int:
        """Of the view process; 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    def open(self, fd: int) -> int:
        """A descriptor of a view of a file, close-on-exec; the caller's.

        It takes about 0.3 ms, and 0.2 s where the view process has to be started anew.

        Args:
            fd: of a regular file, open for reading and writing; stays the caller's.

        Raises:
            OSError: EINVAL or EBADF, it is not such a file; ELOOP, it is on a file system that is stacked on
                others too deeply; ENOTCONN, views are not available, or not any more (see `reason`); and as open(2).
        """
        while self._process is not None:
            try:
                return self._process.open(fd)
            except Unavailable as problem:
                self._begin_anew(str(problem))
        raise OSError(errno.ENOTCONN, self.reason)

    def close(self) -> None:
        """End the view process. Views that are open or mapped stay so. May be called twice."""
        self.reason = self.reason or "closed"
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin_anew(self, problem: str) -> None:
        """Start another view process in place of one that is gone, unless that has happened too often."""
        assert self._process is not None
        self._process.close()
        self._process = None
        now = time.monotonic()
        while self._starts and self._starts[0] <= now - CRASH_SECONDS:
            self._starts.popleft()
        if len(self._starts) < MOST_STARTS:
            self._starts.append(now)
            try:
                self._process = ViewProcess()
            except Unavailable as failure:
                problem = f"{problem}, and cannot be started anew: {failure}"
            else:
                log.info("the view process was started anew", reason=problem)
                return
        self.reason = problem
        log.error("no more DAX for files that are not mapped already: restart vfs-backend", reason=problem)
        self.on_end()


class ViewProcess:
    """A running view process and its mount.

    Attributes:
        pid: of the process.

    Raises:
        Unavailable: it cannot be started, or can make no views.
    """

    def __init__(self) -> None:
        self._mount_fd = -1
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with theirs:
                self._process = _start(theirs.fileno())
            self.pid = self._process.pid
            self._begin()
        except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            self.close()
            raise Unavailable(f"the view process: {error}") from None
        except Unavailable:
            self.close()
            raise

    def open(self, fd: int) -> int:
        """As View.open().

        Raises:
            Unavailable: the process is of no use any more.
            OSError: this file cannot be viewed.
        """
        shown = self._show(fd)
        if shown.error:
            raise OSError(shown.error, os.strerror(shown.error))
        try:
            return os.open(shown.name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._mount_fd)
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise _gone("its mount was ended") from None
            raise

    def close(self) -> None:
        """Let no process and no descriptor remain. May be called twice."""
        self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._mount_fd >= 0:
            os.close(self._mount_fd)
            self._mount_fd = -1

    def _begin(self) -> None:
        assert self._process is not None
        self._socket.settimeout(START_TIMEOUT)
        data, fds = receive(self._socket)
        if not data:
            # By SIGSYS, -31, where a filter of system calls lets nobody mount.
            raise Unavailable(f"the view process ended with status {self._process.wait(START_TIMEOUT)}")
        reason = msgspec.json.decode(data, type=Mounted).reason
        if reason is not None:
            raise Unavailable(reason)
        self._mount_fd = fds[0]
        self._socket.settimeout(ANSWER_TIMEOUT)
        trial = os.memfd_create("trial", os.MFD_CLOEXEC)
        try:
            os.close(self.open(trial))
        except PermissionError:
            # A container may have the capability for itself only; FUSE can be mounted with that.
            raise Unavailable("it takes the capability CAP_SYS_ADMIN of the whole machine") from None
        finally:
            os.close(trial)

    def _show(self, fd: int) -> Shown:
        try:
            send(self._socket, Show(), fd)
            data, _ = receive(self._socket)
        except TimeoutError:
            raise _gone(f"no answer in {ANSWER_TIMEOUT:g} s") from None
        except ConnectionError:
            data = b""
        if not data:
            raise _gone("it ended")
        return msgspec.json.decode(data, type=Shown)


def _start(socket_fd: int) -> subprocess.Popen[bytes]:
    # -P: nothing is imported from the current directory.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "coherent_vfs.server.dax.view_process", str(socket_fd)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[socket_fd],
        start_new_session=True,
    )


def _gone(how: str) -> Unavailable:
    return Unavailable(f"the view process is gone: {how}")
