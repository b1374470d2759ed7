"""A backend's membership of a domain: its table, its journal, and its link to coherenced.

The link is watched from attach on. When coherenced goes away the table's floor is set to trust nothing at
once, and the backend comes back to the next coherenced by itself.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from coherent_vfs.coherence.client.dax import DaxClient
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.protocol.connection import Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    DAEMON_DECODER,
    PROTOCOL,
    Answer,
    Ask,
    Claimed,
    Coordinate,
    FromDaemon,
    Granted,
    Hello,
    Join,
    Ready,
    Refused,
    Registered,
    Resize,
    Revoke,
    TruncateGranted,
    Unwatch,
    Watch,
    Watched,
    Welcome,
    Windowed,
)
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import existing_socket_of
from coherent_vfs.coherence.shm.table import Journal, Table

log = get_logger(__name__)

JOIN_SECONDS = 10.0
RETRY_SECONDS = 0.1
# Unanswered requests for watches: so few answers always find room in the socket, however late they are read.
MAX_ASKED = 64


class Loop(Protocol):
    """What a membership needs of the backend's event loop; asyncio's has it."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> object:
        """Call back whenever fd is readable."""

    def remove_reader(self, fd: int) -> object:
        """Stop that."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call back once, after so many seconds."""


class Membership:
    """Made by join. It belongs to the process that joined: not to a fork of it.

    Attributes:
        table: the domain's table, writable. The same object over every restart of coherenced.
        leases: its lease table; likewise.
        journal: this backend's journal; likewise.
        dax: the guest's DAX window, and the truncations of files.
    """

    table: Table
    leases: Leases
    journal: Journal

    def __init__(self, table_path: str, socket_path: Path, share_root: int, request: Join, window: int = 0) -> None:
        self.dax = DaxClient(window)
        self._table_path = table_path
        self._socket_path = socket_path
        self._request = request
        self._loop: Loop | None = None
        self._counters: Callable[[], Mapping[str, int]] = dict
        self._watched: Callable[[int, bool], None] = lambda token, ok: None
        self._forgotten: Callable[[], None] = lambda: None
        self._asked = 0
        # Of these, how many were asked for a guest that has gone: the first ones.
        self._outdated = 0
        self._unwatching = False
        self._connection: Connection[FromDaemon] | None = None
        self._domain: bytes | None = None
        self._key: int | None = None
        self._registered = False
        self._over = False
        self._complaint: str | None = None
        # A sandboxed backend finds the socket again through this directory; by its path it might find
        # something that its guest has put there.
        try:
            self._directory = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreachable(socket_path, error) from None
        self._share_root = os.dup(share_root)

    @classmethod
    def join(
        cls,
        table_path: str,
        *,
        share_root: int,
        guest: str,
        cache: str,
        socket_path: str | None = None,
        window: int = 0,
    ) -> Membership:
        """Join the domain of a table, waiting for coherenced to agree (10 seconds at most).

        Args:
            table_path: the table's file, such as /dev/shm/vt.
            share_root: an O_PATH descriptor of the shared directory; it is duplicated.
            guest: what people call the guest, at most 64 characters.
            cache: the share's cache mode.
            socket_path: of coherenced; None for the one that belongs to the table.
            window: size of the guest's DAX window, bytes, a multiple of 2 MiB; 0 for none.

        Raises:
            UserError: no coherenced, not permitted, another version of table or protocol, or it refused.
        """
        membership = cls(
            table_path,
            Path(socket_path) if socket_path is not None else existing_socket_of(table_path),
            share_root,
            Join(guest, cache),
            window,
        )
        try:
            membership._join()
        except BaseException:
            membership.close()
            raise
        return membership

    def attach(
        self,
        loop: Loop,
        counters: Callable[[], Mapping[str, int]] = dict,
        watched: Callable[[int, bool], None] = lambda token, ok: None,
        forgotten: Callable[[], None] = lambda: None,
    ) -> None:
        """From now on notice the end of coherenced, come back to the next one, and answer its questions.

        Args:
            loop: calls back in the thread that serves the guest.
            counters: called when somebody asks for the status; at most 32 names of at most 64 characters.
            watched: called with a token that was given to watch, and whether the thing is watched from now on.
            forgotten: called when coherenced is gone: nothing is watched any more.
        """
        self._loop = loop
        self._counters = counters
        self._watched = watched
        self._forgotten = forgotten
        self.dax.serve(loop)
        if self._connection is not None:
            self._connection.settimeout(0)
            loop.add_reader(self._connection.fileno(), self._readable)

    def watch(self, fd: int, token: int) -> bool:
        """Ask coherenced to watch a directory, or a file with several links. It never waits.

        Args:
            fd: an O_PATH descriptor of it, which the caller goes on owning.
            token: given to the callback `watched` with the answer.

        Returns:
            Whether an answer will come; otherwise ask again at the next occasion.
        """
        if self._loop is None or self._connection is None or not self._registered or self._asked >= MAX_ASKED:
            return False
        if self._unwatching:
            # The other order would end what is asked for now.
            return False
        try:
            self._connection.send(Watch(token), [fd])
        except Dropped:
            # Its queue is full; or it is gone, which its socket tells.
            return False
        self._asked += 1
        return True

    def unwatch(self) -> None:
        """The guest has gone: let coherenced watch nothing for it. It never waits; answers to come are dropped."""
        self._outdated = self._asked
        self._unwatching = self._registered
        self._send_unwatch()

    def _send_unwatch(self) -> None:
        if not self._unwatching or self._connection is None or self._loop is None:
            return
        try:
            self._connection.send(Unwatch())
        except Dropped:
            # As in watch().
            self._loop.call_later(RETRY_SECONDS, self._send_unwatch)
            return
        self._unwatching = False

    def close(self) -> None:
        """Leave the domain. Table and journal stay mapped as long as somebody holds them."""
        self._over = True
        # Before the connection ends: a backend that still holds its journal then makes everybody ask.
        if self._key is not None:
            self.journal.clear()
            liveness.let_go(self._key)
            self._key = None
        self.dax.close()
        self._disconnect()
        if self._directory >= 0:
            os.close(self._directory)
            os.close(self._share_root)
            self._directory = -1

    def _join(self) -> None:
        try:
            self._connection = self._connect()
        except OSError as error:
            raise _unreachable(self._socket_path, error) from None
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            self._connection.send(Hello(PROTOCOL, "backend"))
            while not (self._registered and self.dax.reported):
                self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
                self._handle(self._connection, *self._connection.receive())
        except TimeoutError:
            raise UserError(f"coherenced at {self._socket_path} does not answer: restart it") from None
        except Dropped as error:
            raise UserError(f"coherenced at {self._socket_path}: {error}: see its log") from None

    def _connect(self) -> Connection[FromDaemon]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            # There is no connectat: the working directory is the only handle that a socket address can use.
            os.fchdir(self._directory)
            sock.setblocking(False)
            sock.connect(self._socket_path.name)
        except BaseException:
            sock.close()
            raise
        finally:
            os.fchdir(before)
            os.close(before)
        return Connection(sock, DAEMON_DECODER, fds=3)

    def _handle(self, connection: Connection[FromDaemon], message: FromDaemon, fds: list[int]) -> None:
        try:
            match message:
                case Welcome():
                    self._welcome(connection, message)
                case Granted() if len(fds) == 3:
                    self._take(message.key, *fds)
                    connection.send(Ready(window=self.dax.window > 0))
                case Registered() if self._key is not None:
                    self._registered = True
                    self._complaint = None
                    self.dax.joined(connection)
                case Windowed() | Claimed() | Coordinate() | TruncateGranted() | Revoke() | Resize() if (
                    self._registered
                ):
                    self.dax.handle(message)
                case Watched() if self._asked:
                    self._asked -= 1
                    if self._outdated:
                        self._outdated -= 1
                        return
                    self._watched(message.token, message.ok)
                case Ask():
                    connection.send(Answer(dict(self._counters())))
                case Refused():
                    raise UserError(message.reason)
                case _:
                    raise Dropped(f"an unexpected message: {type(message).__name__}")
        finally:
            for fd in fds:
                os.close(fd)

    def _welcome(self, connection: Connection[FromDaemon], welcome: Welcome) -> None:
        if welcome.protocol != PROTOCOL:
            raise UserError(
                f"coherenced speaks protocol {welcome.protocol}, this program {PROTOCOL}: install one version of both"
            )
        if self._domain is not None and welcome.domain != self._domain:
            self._over = True
            raise UserError(
                f"coherenced has a new table for {self._table_path}, as the old one was removed: "
                "restart this virtual machine and its backend; until then others are not told what it changes"
            )
        connection.send(msgspec.structs.replace(self._request, key=self._key), [self._share_root])

    def _take(self, key: int, table_fd: int, leases_fd: int, journal_fd: int) -> None:
        if self._domain is None:
            self._check_same_file(table_fd)
            self.table = Table.from_fd(table_fd, True, self._table_path)
            self.leases = Leases.from_fd(leases_fd, self.table)
            self._domain = self.table.domain
        else:
            self.leases.move(leases_fd)
        if key == self._key:
            return
        liveness.take(key)
        if self._key is None:
            self.journal = Journal.from_fd(journal_fd)
        else:
            self.journal.move(journal_fd)
            liveness.let_go(self._key)
        self._key = key

    def _check_same_file(self, table_fd: int) -> None:
        try:
            same = os.path.samestat(Path(self._table_path).stat(), os.fstat(table_fd))
        except OSError as error:
            raise UserError(f"{self._table_path}: {error.strerror}: name the table of this coherenced") from None
        if not same:
            raise UserError(
                f"coherenced at {self._socket_path} serves another table than {self._table_path}: "
                "name both of one domain"
            )

    def _readable(self) -> None:
        assert self._connection is not None
        try:
            self._handle(self._connection, *self._connection.receive())
        except BlockingIOError:
            return
        except Dropped as error:
            self._lost(str(error))
        except UserError as error:
            self._lost(str(error))
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("coherenced does not take this backend back", reason=str(error))

    def _lost(self, reason: str) -> None:
        self.table.distrust()
        self._disconnect()
        if self._registered:
            self._registered = False
            self._asked = self._outdated = 0
            self._unwatching = False
            self.dax.lost()
            self._forgotten()
            log.warning("coherenced is gone: nothing is trusted until it is back", reason=reason)
        self._retry_later()

    def _retry_later(self) -> None:
        if self._loop is not None and not self._over:
            self._loop.call_later(RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        if self._loop is None or self._over:
            return
        # Before each attempt, so that only a registration after it can lower the floor again.
        self.table.distrust()
        try:
            self._connection = self._connect()
        except OSError:
            self._retry_later()
            return
        self._loop.add_reader(self._connection.fileno(), self._readable)
        try:
            self._connection.send(Hello(PROTOCOL, "backend"))
        except Dropped as error:
            self._lost(str(error))

    def _disconnect(self) -> None:
        if self._connection is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None


def _unreachable(socket_path: Path, error: OSError) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"{socket_path}: not permitted: join the group of coherenced's socket")
    return UserError(f"no coherenced at {socket_path}: start it, or name its --socket")
