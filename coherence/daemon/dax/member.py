"""One backend as the allocator sees it: its window, its open revocations, and its pending Resize messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coherent_vfs.coherence.daemon.dax.windows import File, Window
from coherent_vfs.coherence.protocol.connection import Connection, Dropped, Full
from coherent_vfs.coherence.protocol.messages import FromClient, Resize, ToBackend

# Least time between two Resize messages for one file that changes on the host.
RESIZE_SECONDS = 0.02


class Member:
    """A member of the domain, with or without a window. Used in the thread of the daemon's event loop only.

    Args:
        guest, pid: of the backend.
        connection: to the backend; it never blocks.
        drop: ends the connection, for this reason.
        is_truncating: whether a file is being truncated: then Resize has to wait.

    Attributes:
        window: of the guest, if it has one.
        telling: whether more Window messages with mappings will follow.
        reported_until: deadline for the last of them (time of the loop); 0 when it has come.
        coordinate: the last Coordinate that the backend was sent.
        revocations: tokens of its unanswered Revokes.
        late: whether it did not read or answer a Revoke in time; no truncation waits for it until it has answered all.
        warned: what was logged once.
        refused: number of its claims that were refused.
        claims: number of its claims that wait.
    """

    def __init__(
        self,
        guest: str,
        pid: int,
        connection: Connection[FromClient],
        drop: Callable[[str], None],
        is_truncating: Callable[[File], bool],
    ) -> None:
        self.guest = guest
        self.pid = pid
        self.window: Window | None = None
        self.telling = False
        self.reported_until = 0.0
        self.coordinate: bool | None = None
        self.revocations: set[int] = set()
        self.late = False
        self.warned: set[str] = set()
        self.refused = 0
        self.claims = 0
        self._connection = connection
        self._drop = drop
        self._is_truncating = is_truncating
        self._loop = asyncio.get_running_loop()
        self._to_resize: dict[File, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._gone = False

    def send(self, message: ToBackend) -> None:
        """Send a message. If the socket is full, drop the member after this turn of the event loop."""
        try:
            self._connection.send(message)
        except Dropped as error:
            self._end(str(error))

    def try_send(self, message: ToBackend) -> bool:
        """Send a message; return whether the socket had room for it."""
        try:
            self._connection.send(message)
        except Full:
            return False
        except Dropped as error:
            self._end(str(error))
        return True

    def resize(self, file: File) -> None:
        """Send Resize for a file that may have changed on the host, now or after RESIZE_SECONDS."""
        self._to_resize[file] = None
        if self._timer is None:
            self._tell()

    def resize_now(self, file: File) -> None:
        """Send Resize for a file whose truncations are over, now if the socket has room."""
        if self.try_send(Resize(*file)):
            self._to_resize.pop(file, None)
        else:
            self.resize(file)

    def forget_resize(self, file: File) -> None:
        """Drop a pending Resize for a file: another one follows when its truncations are over."""
        self._to_resize.pop(file, None)

    def leave(self) -> None:
        """The connection is over."""
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()

    def warn_once(self, what: str) -> bool:
        """Whether this was not logged before."""
        new = what not in self.warned
        self.warned.add(what)
        return new

    def _tell(self) -> None:
        self._timer = None
        for file in list(self._to_resize):
            if not self._is_truncating(file) and not self.try_send(Resize(*file)):
                break
            del self._to_resize[file]
        self._timer = self._loop.call_later(RESIZE_SECONDS, self._tell_again)

    def _tell_again(self) -> None:
        self._timer = None
        if self._to_resize and not self._gone:
            self._tell()

    def _end(self, reason: str) -> None:
        if not self._gone:
            self._gone = True
            self._loop.call_soon(self._drop, reason)
