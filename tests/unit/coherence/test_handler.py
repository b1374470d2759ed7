"""Clients that are too slow, on a loop of the test's own; other misbehaviour is in tests/integration."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from coherence import handler
from coherence.connection import Connection
from coherence.messages import (
    CLIENT_DECODER,
    ENCODER,
    PROTOCOL,
    FromClient,
    Hello,
    Join,
    StatusPage,
    StatusQuestion,
)
from coherence.places import Places
from coherence.registry import Registry
from coherence.table import Table

ExpectLog = Callable[[str], None]


class Daemon:
    """As much of a daemon as a handler needs; its status never comes."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.table_fd = 0

    async def status_page(self, first: int) -> StatusPage:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Hello(PROTOCOL, "backend")],
        [Hello(PROTOCOL, "backend"), Join("slow", "none", 1, 2)],
        [Hello(PROTOCOL, "control")],
        [Hello(PROTOCOL, "control"), StatusQuestion()],
    ],
)
def test_a_client_that_does_not_go_on_is_dropped(
    table: Table,
    places: Places,
    expect_log: ExpectLog,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[FromClient],
) -> None:
    expect_log("too slow")
    monkeypatch.setattr(handler, "DEADLINE_SECONDS", 0.05)
    registry = Registry(table, places)

    async def serve() -> None:
        client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.setblocking(False)
        over: asyncio.Future[handler.Handler] = asyncio.get_running_loop().create_future()
        with client:
            handler.Handler(Daemon(registry), Connection(server, CLIENT_DECODER), over.set_result)
            for message in messages:
                client.send(ENCODER.encode(message))
            await asyncio.wait_for(over, 10)

    asyncio.run(serve())
    assert places.journal_keys() == []
