"""What the daemon does with one client's messages, from its Hello to the end of its connection."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable
from typing import Protocol

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon import journals
from coherent_vfs.coherence.daemon.dax.allocator import Allocator
from coherent_vfs.coherence.daemon.dax.member import Member
from coherent_vfs.coherence.daemon.event_feed import ChangeEvents, Subscriber
from coherent_vfs.coherence.daemon.registry import Registry
from coherent_vfs.coherence.daemon.watch.host_watch import HostWatch
from coherent_vfs.coherence.protocol.connection import Closed, Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    PROTOCOL,
    Answer,
    Ask,
    Backend,
    Claim,
    DaxPage,
    DaxQuestion,
    FromClient,
    Granted,
    Hello,
    Join,
    Ready,
    Refused,
    Registered,
    Release,
    Revoked,
    StatusPage,
    StatusQuestion,
    Subscribe,
    Subscribed,
    Truncate,
    Truncated,
    Unwatch,
    Watch,
    Watched,
    Welcome,
    Window,
)

log = get_logger(__name__)

DEADLINE_SECONDS = 10.0


class Daemon(Protocol):
    """What a handler needs of the daemon around it."""

    registry: Registry
    table_fd: int
    leases_fd: int
    watch: HostWatch
    events: ChangeEvents
    dax: Allocator

    def table_removed(self) -> bool:
        """Whether the table has no file, or another one, under its name."""

    async def status_page(self, first: int) -> StatusPage:
        """The status, with the backends from number `first` on."""


class Handler:
    """One client. Whatever it does wrong ends its own connection with a log line, and nothing else.

    Args:
        daemon: whose client it is.
        connection: which must never wait (settimeout(0)).
        on_close: called once, when the connection is over.

    Attributes:
        root: of a backend that has joined, an O_PATH descriptor of its share's root.
    """

    def __init__(self, daemon: Daemon, connection: Connection[FromClient], on_close: Callable[[Handler], None]) -> None:
        self._daemon = daemon
        self._connection = connection
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._pid, self._uid = connection.peer()
        self._role: str | None = None
        self._key: int | None = None
        self._join: Join | None = None
        self.root = -1
        self._root = (0, 0)
        self._since: float | None = None
        self._answer: asyncio.Future[dict[str, int] | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._subscriber: Subscriber | None = None
        self._peer: Member | None = None
        self._deadline = self._loop.call_later(DEADLINE_SECONDS, self._drop, "it is too slow")
        self._loop.add_reader(connection.fileno(), self._readable)

    @property
    def registered(self) -> bool:
        """Whether this is a backend that is a member."""
        return self._since is not None

    async def backend(self, seconds: float) -> Backend | None:
        """This member for the status, asking it for its counters and waiting so long for them at most.

        None when it is no member any more: it may have gone since whoever called this was asked.
        """
        if self._join is None or self._since is None:
            return None
        member_seconds = time.monotonic() - self._since
        counters: dict[str, int] | None = None
        try:
            if self._answer is None:
                self._answer = self._loop.create_future()
                self._connection.send(Ask())
            counters = await asyncio.wait_for(asyncio.shield(self._answer), seconds)
        except TimeoutError:
            log.info("no answer for the status", guest=self._join.guest, pid=self._pid)
        except Dropped as error:
            self._drop(str(error))
        return Backend(
            pid=self._pid,
            guest=self._join.guest,
            cache=self._join.cache,
            device=self._root[0],
            inode=self._root[1],
            seconds=member_seconds,
            counters=counters,
        )

    def close(self) -> None:
        """End the connection; the registry learns of a backend's leave."""
        if self._connection.fileno() < 0:
            return
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        if self.root >= 0:
            os.close(self.root)
        self._deadline.cancel()
        if self._answer is not None:
            self._answer.set_result(None)
            self._answer = None
        if self._task is not None:
            self._task.cancel()
        if self._subscriber is not None:
            self._daemon.events.remove(self._subscriber)
        self._since = None
        if self._key is not None:
            self._daemon.watch.leave(self._key)
            self._daemon.registry.leave(self._key)
        if self._peer is not None:
            self._daemon.dax.leave(self._peer)
        self._on_close(self)

    def _drop(self, reason: str) -> None:
        log.warning("client dropped", reason=reason, pid=self._pid)
        self.close()

    def _readable(self) -> None:
        try:
            message, fds = self._connection.receive()
            try:
                self._handle(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        except BlockingIOError:
            return
        except Closed:
            log.debug("client gone", pid=self._pid)
            self.close()
        except Dropped as error:
            self._drop(str(error))
        except UserError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        try:
            self._connection.send(Refused(reason))
        except Dropped as error:
            reason = f"{reason} ({error})"
        self._drop(reason)

    def _handle(self, message: FromClient, fds: list[int]) -> None:
        match message, self._role:
            case Hello(), None:
                self._hello(message)
            case Join(), "backend" if self._join is None:
                self._grant(message, fds)
            case Ready(), "backend" if self._key is not None and not self.registered:
                self._register(self._key, message.window)
            case Watch(), "backend" if self.registered:
                self._watch(message.token, fds)
            case Unwatch(), "backend" if self.registered and not fds:
                self._daemon.watch.unwatch(self._key or 0)
            case Window() | Claim() | Release() | Truncate() | Truncated() | Revoked(), "backend" if (
                self._peer is not None
            ):
                self._daemon.dax.handle(self._peer, message, fds)
            case _ if fds:
                raise Dropped("a descriptor that nobody asked for")
            case Answer(), "backend" if self._answer is not None:
                self._answer.set_result(message.counters)
                self._answer = None
            case StatusQuestion(), "control" if self._task is None and self._subscriber is None:
                self._task = self._loop.create_task(self._send_status(message.first))
            case DaxQuestion(), "control" if self._task is None and self._subscriber is None:
                self._answer_control(self._daemon.dax.page(message.first, message.files))
            case Subscribe(), "control" if self._task is None and self._subscriber is None:
                self._subscribe(message.path)
            case _:
                raise Dropped(f"an unexpected message: {type(message).__name__}")

    def _hello(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise UserError(
                f"coherenced speaks protocol {PROTOCOL}, this program {hello.protocol}: install one version of both"
            )
        self._role = hello.role
        self._connection.fds = 1 if hello.role == "backend" else 0
        self._connection.send(Welcome(PROTOCOL, self._daemon.registry.table.domain))

    def _grant(self, join: Join, fds: list[int]) -> None:
        registry = self._daemon.registry
        # Numbers of a directory prove nothing: whoever has a descriptor of it got at it.
        root = os.fstat(fds[0]) if fds else None
        if root is None or not stat.S_ISDIR(root.st_mode):
            raise UserError("the backend gave no descriptor of its share's directory: report this as a bug")
        if join.key is None and self._daemon.table_removed():
            raise UserError(
                f"{registry.paths.table} was removed while coherenced runs: stop its virtual machines, restart "
                "coherenced, then start them again"
            )
        self.root, self._root = fds.pop(0), (root.st_dev, root.st_ino)
        self._key = registry.grant(self._pid, self._uid, join.key)
        self._join = join
        fd = journals.open_fd(registry.paths, self._key)
        try:
            self._connection.send(Granted(self._key), [self._daemon.table_fd, self._daemon.leases_fd, fd])
        finally:
            os.close(fd)

    def _register(self, key: int, window: bool) -> None:
        assert self._join is not None
        registry = self._daemon.registry
        registry.register(key, self._pid, self._root, window)
        number, journal = registry.backend_ids.get(key, 0), registry.paths.journal(key)
        self._daemon.watch.join(key, number, self._join.guest, journal, self._pid)
        self._since = time.monotonic()
        self._deadline.cancel()
        self._connection.send(Registered())
        self._peer = self._daemon.dax.join(self._join.guest, self._pid, self._connection, self._drop, window)
        log.info("backend registered", guest=self._join.guest, cache=self._join.cache, pid=self._pid)

    def _watch(self, token: int, fds: list[int]) -> None:
        # Without a descriptor where this process has too many of them.
        ok = bool(fds) and self._daemon.watch.watch(self._key or 0, fds.pop())
        self._connection.send(Watched(token, ok))

    def _subscribe(self, path: bytes) -> None:
        if self._daemon.watch.kind == "none":
            raise UserError("coherenced runs with --watch none, so it sees no changes: start it with another")
        subscriber = Subscriber(self._connection, path, self._drop)
        self._daemon.events.add(subscriber)
        self._subscriber = subscriber
        self._deadline.cancel()
        self._connection.send(Subscribed())

    async def _send_status(self, first: int) -> None:
        page = await self._daemon.status_page(first)
        self._task = None
        try:
            self._answer_control(page)
        except Dropped as error:
            self._drop(str(error))

    def _answer_control(self, page: StatusPage | DaxPage) -> None:
        self._deadline.cancel()
        self._deadline = self._loop.call_later(DEADLINE_SECONDS, self._drop, "it is too slow")
        self._connection.send(page)
