"""One backend as the allocator sees it: its window, what it is asked for, and what it still has to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coherent_vfs.coherence.daemon.dax.windows import File, Window
from coherent_vfs.coherence.protocol.connection import Connection, Dropped, Full
from coherent_vfs.coherence.protocol.messages import FromClient, Settle, ToBackend

# A backend is told of changes of one file on the host so often at most.
SETTLE_SECONDS = 0.02


class Member:
    """A member of the domain. It has a window or none; all in the thread of the daemon's event loop.

    Args:
        guest, pid: of the backend.
        connection: which never waits.
        drop: ends the connection, for this reason.
        is_cut: whether a file is being made smaller: then nobody is told to settle it.

    Attributes:
        window: of the guest, if it has one.
        telling: whether more of what is mapped in it is to be told.
        reported_until: when it must have been told (time of the loop); 0 when it is.
        coordinate: what the backend knows of others' windows.
        withdrawals: tokens of its unanswered Withdraws.
        late: whether it let others wait for too long; until it has answered nobody waits for it.
        warned: what was logged once.
        refused: how many of its claims were refused.
        claims: how many of its claims wait.
    """

    def __init__(
        self,
        guest: str,
        pid: int,
        connection: Connection[FromClient],
        drop: Callable[[str], None],
        is_cut: Callable[[File], bool],
    ) -> None:
        self.guest = guest
        self.pid = pid
        self.window: Window | None = None
        self.telling = False
        self.reported_until = 0.0
        self.coordinate: bool | None = None
        self.withdrawals: set[int] = set()
        self.late = False
        self.warned: set[str] = set()
        self.refused = 0
        self.claims = 0
        self._connection = connection
        self._drop = drop
        self._is_cut = is_cut
        self._loop = asyncio.get_running_loop()
        self._unsettled: dict[File, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._gone = False

    def send(self, message: ToBackend) -> None:
        """Send a message for which there must be room. Who does not read is dropped, after this turn of the loop."""
        try:
            self._connection.send(message)
        except Dropped as error:
            self._end(str(error))

    def try_send(self, message: ToBackend) -> bool:
        """Send a message; whether there was room for it."""
        try:
            self._connection.send(message)
        except Full:
            return False
        except Dropped as error:
            self._end(str(error))
        return True

    def settle(self, file: File) -> None:
        """The file may have changed on the host: tell, at once or soon."""
        self._unsettled[file] = None
        if self._timer is None:
            self._tell()

    def settle_now(self, file: File) -> None:
        """The file was made smaller, or not: tell at once."""
        if self.try_send(Settle(*file)):
            self._unsettled.pop(file, None)
        else:
            self.settle(file)

    def forget_settling(self, file: File) -> None:
        """It will be told later: when the file has been made smaller."""
        self._unsettled.pop(file, None)

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
        for file in list(self._unsettled):
            if not self._is_cut(file) and not self.try_send(Settle(*file)):
                break
            del self._unsettled[file]
        self._timer = self._loop.call_later(SETTLE_SECONDS, self._tell_again)

    def _tell_again(self) -> None:
        self._timer = None
        if self._unsettled and not self._gone:
            self._tell()

    def _end(self, reason: str) -> None:
        if not self._gone:
            self._gone = True
            self._loop.call_soon(self._drop, reason)
