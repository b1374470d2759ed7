"""The running coherenced: its table, its socket, its clients, and its signals, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coherent_vfs.coherence.common.errors import OtherClock, UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.common.sd_notify import Notifier
from coherent_vfs.coherence.common.unix_socket import Acceptor, open_listener, permit
from coherent_vfs.coherence.daemon.dax.allocator import Allocator
from coherent_vfs.coherence.daemon.dax.write_mappings import WriteMappings
from coherent_vfs.coherence.daemon.event_feed import ChangeEvents
from coherent_vfs.coherence.daemon.metrics.address import Address, listen
from coherent_vfs.coherence.daemon.metrics.server import MetricsServer
from coherent_vfs.coherence.daemon.registry import Registry
from coherent_vfs.coherence.daemon.session import Handler
from coherent_vfs.coherence.daemon.watch.host_watch import Kind, open_watch
from coherent_vfs.coherence.daemon.watch.invalidator import Domain
from coherent_vfs.coherence.daemon.watch.mounts import Mounts
from coherent_vfs.coherence.protocol.connection import Connection
from coherent_vfs.coherence.protocol.messages import CLIENT_DECODER, Backend, FloorReason, Status, StatusPage, Watching
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths, open_file
from coherent_vfs.coherence.shm.table import Table

log = get_logger(__name__)

MAX_CLIENTS = 1024
ANSWER_SECONDS = 0.3
# What a packet holds (MAX_BYTES) even when every label is as long as it may be.
PAGE_BACKENDS = 5
SWEEP_SECONDS = 0.1
SAMPLE_SECONDS = 1.0


class Service:
    """One coherenced. It is a context: leaving it lets the next daemon take over.

    Args:
        paths: of the table.
        slots: slot count of a table that has to be made.
        socket_path, socket_bits, socket_group: of the control socket.
        watch: how to see changes on the host.
        max_watches: how many watches at most, None for as many as the system allows.
        metrics: where to serve metrics, None for nowhere.
        dax_limits: of a DAX window, and of all that is mapped in them; bytes.

    Raises:
        UserError: another daemon has the table, the table cannot be used, a socket cannot be had, or the host
            cannot be watched so.
    """

    def __init__(
        self,
        paths: DomainPaths,
        slots: int,
        socket_path: Path,
        socket_bits: int,
        socket_group: str | None,
        watch: Kind = "inotify",
        max_watches: int | None = None,
        metrics: Address | None = None,
        dax_limits: tuple[int, int] = (0, 0),
    ) -> None:
        self._paths = paths
        self._socket_path = socket_path
        self._started = time.monotonic()
        self._handlers: list[Handler] = []
        self._rate = 0.0
        self._reported_removed = False
        with contextlib.ExitStack() as stack:
            self._lock_fd = _lock(paths)
            stack.callback(os.close, self._lock_fd)
            table = _open_table(paths, slots)
            stack.callback(table.close)
            self.table_fd = open_file(paths.table, os.O_RDWR)
            stack.callback(os.close, self.table_fd)
            self.permit_table(socket_group)
            leases = _open_leases(paths, table)
            stack.callback(leases.close)
            self.leases_fd = open_file(paths.leases, os.O_RDWR)
            stack.callback(os.close, self.leases_fd)
            self._listener = open_listener(socket_path, socket_bits, socket_group)
            stack.callback(self._listener.close)
            self._metrics = None if metrics is None else self._open_metrics(metrics, stack)
            self.registry = Registry(table, leases, paths)
            write_mappings = WriteMappings(table, leases)
            self.dax = Allocator(*dax_limits, table.inode_slot, write_mappings, lambda: bool(self.registry.missing))
            self.registry.unreported = self.dax.unreported
            self.domain = Domain(table, leases, self._events_lost)
            self.domain.on_data = self.dax.changed
            self.watch = open_watch(watch, self.domain, max_watches)
            stack.callback(self.watch.close)
            self._mounts = Mounts(self.watch, self._roots, lambda: self.registry.raise_floor("mount"))
            stack.callback(self._mounts.close)
            self.events = ChangeEvents(self.domain)
            self.registry.recover()
            self._sampled = table.sequence, self._started
            self._stack = stack.pop_all()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket_path.unlink(missing_ok=True)
        self._stack.close()

    def permit_table(self, group: str | None) -> None:
        """Let the group read the table: that is how a guest's QEMU gets at it."""
        permit(self._paths.table, 0o640, group)

    def permit_socket(self, bits: int, group: str | None) -> None:
        """Change who may connect, and read the table."""
        permit(self._socket_path, bits, group)
        self.permit_table(group)

    async def run(self, notifier: Notifier, reload: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP calls `reload`.

        An error that nobody expected ends it, too: a daemon that may have missed a death must not go on, and
        the next one recovers.
        """
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(lambda _, context: _fail(end, context))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _finish, end)
        loop.add_signal_handler(signal.SIGHUP, reload)
        acceptor = Acceptor(
            self._listener, loop, self._accepted, "client", "its socket was shut down: restart coherenced"
        )
        acceptor.start()
        self.dax.start()
        self.watch.start(loop)
        self._mounts.start(loop)
        metrics = None if self._metrics is None else loop.create_task(self._metrics.run())
        self._repeat(SWEEP_SECONDS, self._sweep)
        self._repeat(SAMPLE_SECONDS, self._sample)
        if notifier.alive_every is not None:
            self._repeat(notifier.alive_every, notifier.alive)
        notifier.ready(f"Table {self._paths.name}")
        log.info("ready", table=self._paths.name, socket=str(self._socket_path), pid=os.getpid())
        try:
            await end
        finally:
            notifier.stopping()
            log.info("stopping", table=self._paths.name)
            acceptor.stop()
            if metrics is not None:
                metrics.cancel()
            # Distrust comes before the backends are let go: they need not be quick to notice.
            self.registry.close()
            for handler in list(self._handlers):
                handler.close()

    async def status_page(self, first: int) -> StatusPage:
        """The status, with the backends from number `first` on."""
        members = self._members()
        page = members[first : first + PAGE_BACKENDS]
        backends = await _backends(page)
        end = first + len(page)
        return StatusPage(self._status(), backends, end if end < len(members) else None)

    def table_removed(self) -> bool:
        """Whether the table has no file, or another one, under its name: whoever comes now cannot get at it."""
        try:
            return not os.path.samestat(self._paths.table.stat(), os.fstat(self.table_fd))
        except OSError:
            return True

    def _members(self) -> list[Handler]:
        return [handler for handler in self._handlers if handler.registered]

    def _roots(self) -> list[int]:
        return [handler.root for handler in self._members()]

    def _status(self) -> Status:
        registry, table = self.registry, self.registry.table
        return Status(
            table=str(self._paths.table),
            domain=table.domain.hex(),
            pid=os.getpid(),
            seconds=time.monotonic() - self._started,
            slots=table.slot_count,
            sequence=table.sequence,
            floor=table.floor,
            trusted=registry.trusted,
            removed=self.table_removed(),
            roots=len(registry.roots),
            missing=registry.missing_pids(),
            outside=registry.outside_pids(),
            bumps_per_second=self._rate,
            floor_raises=registry.floor_raises,
            distrusts=registry.distrusts,
            watch=self._watching(),
            dax=self.dax.use(),
        )

    def _watching(self) -> Watching:
        counts, watch = self.domain.counts, self.watch
        return Watching(
            kind=watch.kind,
            watches=watch.watches,
            limit=watch.limit,
            refused=counts.refused,
            overflows=counts.overflows,
            events=counts.events,
            bumped=counts.bumped,
            own=counts.own,
            gone=counts.gone,
        )

    def _open_metrics(self, address: Address, stack: contextlib.ExitStack) -> MetricsServer:
        # Only where it is wanted: while a daemon starts, guests ask for everything, and this library takes long.
        from coherent_vfs.coherence.daemon.metrics.families import CONTENT_TYPE, render

        async def gather() -> bytes:
            backends = await _backends(self._members())
            return render(self._status(), backends)

        listener = listen(address)
        stack.callback(listener.close)
        if isinstance(address, Path):
            stack.callback(address.unlink, missing_ok=True)
        log.info("metrics", address=listener.getsockname())
        return MetricsServer(listener, CONTENT_TYPE, gather)

    def _accepted(self, sock: socket.socket) -> None:
        if len(self._handlers) >= MAX_CLIENTS:
            log.warning("client dropped", reason=f"there are {MAX_CLIENTS} already")
            sock.close()
            return
        sock.setblocking(False)
        self._handlers.append(Handler(self, Connection(sock, CLIENT_DECODER), self._handlers.remove))

    def _sweep(self) -> None:
        self.registry.sweep()
        self.dax.sweep()

    def _events_lost(self, reason: FloorReason) -> None:
        """The host watch has missed changes, so anything may have changed."""
        self.registry.raise_floor(reason)
        self.dax.changed(None)

    def _sample(self) -> None:
        if not self._reported_removed and self.table_removed():
            self._reported_removed = True
            log.error(
                "the table was removed: stop the virtual machines, restart coherenced, then start them again",
                table=str(self._paths.table),
            )
        sequence, now = self.registry.table.sequence, time.monotonic()
        old_sequence, old = self._sampled
        self._rate = (sequence - old_sequence) / (now - old)
        self._sampled = sequence, now

    def _repeat(self, seconds: float, call: Callable[[], None]) -> None:
        call()
        asyncio.get_running_loop().call_later(seconds, self._repeat, seconds, call)


async def _backends(members: list[Handler]) -> list[Backend]:
    backends = await asyncio.gather(*(handler.backend(ANSWER_SECONDS) for handler in members))
    return [backend for backend in backends if backend is not None]


def _finish(end: asyncio.Future[None]) -> None:
    if not end.done():
        end.set_result(None)


def _fail(end: asyncio.Future[None], context: dict[str, Any]) -> None:
    if not end.done():
        end.set_exception(context.get("exception") or RuntimeError(context["message"]))


def _lock(paths: DomainPaths) -> int:
    """Be the one daemon of the table. The kernel gives the lock back however this process ends."""
    try:
        fd = open_file(paths.lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"{paths.lock}: {error.strerror}: remove it, or run coherenced as its owner") from None
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise UserError(f"{paths.lock} belongs to another user: remove it, or choose another --table")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(
            f"table {paths.name} has a running coherenced already: stop it, or choose another --table"
        ) from None
    return fd


def _open_table(paths: DomainPaths, slots: int) -> Table:
    """The table that an earlier daemon left, or a new one."""
    try:
        fd = open_file(paths.table, os.O_RDWR)
    except FileNotFoundError:
        return Table.create(paths.name, slots)
    except OSError as error:
        raise UserError(f"{paths.table}: {error.strerror}: remove it, or choose another --table") from None
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise UserError(f"{paths.table} belongs to another user: remove it, or choose another --table")
        if os.pread(fd, 8, 0) in (b"", bytes(8)):
            # Its magic is written last: a daemon was killed while it made the table, and nobody has used it.
            paths.table.unlink()
            return Table.create(paths.name, slots)
        table = Table.from_fd(fd, writable=True, what=str(paths.table))
    finally:
        os.close(fd)
    if table.slot_count != slots:
        log.warning("the table keeps its slot count until its file is removed", slots=table.slot_count)
    return table


def _open_leases(paths: DomainPaths, table: Table) -> Leases:
    """The lease table that an earlier daemon left for this version table, or a new one."""
    try:
        with os.fdopen(open_file(paths.leases, os.O_RDWR), "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                return Leases.from_fd(file.fileno(), table)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{paths.leases}: {error.strerror}: remove it") from None
    except OtherClock as error:
        # Backends that still run count by it.
        raise UserError(f"{paths.leases}: {error}; or remove it when none of them runs") from None
    except UserError:
        # Of a table that is gone, or never finished.
        pass
    paths.leases.unlink(missing_ok=True)
    return Leases.create(f"/{paths.leases.name}", table)
