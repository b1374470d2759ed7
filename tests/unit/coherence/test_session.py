"""Clients that are too slow or go at a bad moment; other misbehaviour is in tests/integration."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from coherent_vfs.coherence.daemon import session
from coherent_vfs.coherence.daemon.dax.allocator import Allocator
from coherent_vfs.coherence.daemon.dax.write_mappings import WriteMappings
from coherent_vfs.coherence.daemon.event_feed import ChangeEvents
from coherent_vfs.coherence.daemon.registry import Registry
from coherent_vfs.coherence.daemon.service import Service
from coherent_vfs.coherence.daemon.watch.host_watch import HostWatch, NoWatch
from coherent_vfs.coherence.daemon.watch.invalidator import Domain
from coherent_vfs.coherence.protocol.connection import Connection
from coherent_vfs.coherence.protocol.messages import (
    CLIENT_DECODER,
    DAEMON_DECODER,
    PROTOCOL,
    FromClient,
    Hello,
    Join,
    Ready,
    StatusPage,
    StatusQuestion,
)
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table
from tests.integration.coherenced_process import open_directory

ExpectLog = Callable[[str], None]


def send(client: socket.socket, message: FromClient) -> None:
    """As a client that has the root directory's descriptor where one is needed."""
    with open_directory(Path("/")) as root:
        Connection(client, DAEMON_DECODER).send(message, [root] if isinstance(message, Join) else [])


class Daemon:
    """As much of a daemon as a handler needs; its status never comes."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.table_fd = self.leases_fd = 0
        self.watch: HostWatch = NoWatch()
        pins = WriteMappings(registry.table, registry.leases)
        self.dax = Allocator(0, 0, registry.table.inode_slot, pins, lambda: False)
        self.events = ChangeEvents(Domain(registry.table, registry.leases, registry.raise_floor))

    def table_removed(self) -> bool:
        return False

    async def status_page(self, first: int) -> StatusPage:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Hello(PROTOCOL, "backend")],
        [Hello(PROTOCOL, "backend"), Join("slow", "none")],
        [Hello(PROTOCOL, "control")],
        [Hello(PROTOCOL, "control"), StatusQuestion()],
    ],
)
def test_a_client_that_does_not_go_on_is_dropped(
    table: Table,
    leases: Leases,
    paths: DomainPaths,
    expect_log: ExpectLog,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[FromClient],
) -> None:
    expect_log("too slow")
    monkeypatch.setattr(session, "DEADLINE_SECONDS", 0.05)
    registry = Registry(table, leases, paths)

    async def serve() -> None:
        client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.setblocking(False)
        over: asyncio.Future[session.Handler] = asyncio.get_running_loop().create_future()
        with client:
            session.Handler(Daemon(registry), Connection(server, CLIENT_DECODER), over.set_result)
            for message in messages:
                send(client, message)
            await asyncio.wait_for(over, 60)

    asyncio.run(serve())
    assert paths.journal_keys() == []


def test_a_backend_that_goes_while_the_status_is_gathered(paths: DomainPaths, tmp_path: Path) -> None:
    async def serve(service: Service) -> None:
        async with asyncio.timeout(60):
            end: asyncio.Future[session.Handler] = asyncio.get_running_loop().create_future()
            page = await member_that_goes(service, end)
            assert (page.backends, page.next) == ([], None)
            await end

    with Service(paths, 1024, tmp_path / "s", 0o600, None) as service:
        asyncio.run(serve(service))


async def member_that_goes(service: Service, end: asyncio.Future[session.Handler]) -> StatusPage:
    """The status that was asked for just before its only backend went, but not gathered yet."""
    client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.setblocking(False)
    with client:
        member = session.Handler(service, Connection(server, CLIENT_DECODER), end.set_result)
        service._handlers.append(member)
        send(client, Hello(PROTOCOL, "backend"))
        send(client, Join("going", "none"))
        while not (keys := service.registry.paths.journal_keys()):
            await asyncio.sleep(0)
        liveness.take(keys[0])
        send(client, Ready())
        while not member.registered:
            await asyncio.sleep(0)
        asking = asyncio.create_task(service.status_page(0))
        await asyncio.sleep(0)
        liveness.let_go(keys[0])
        member.close()
        return await asking
