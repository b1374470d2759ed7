"""Who is told of changes, and what becomes of those that a subscriber does not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon import event_feed
from coherent_vfs.coherence.daemon.event_feed import ChangeEvents, Subscriber, merged
from coherent_vfs.coherence.daemon.watch.invalidator import Domain, What
from coherent_vfs.coherence.protocol.connection import Connection
from coherent_vfs.coherence.protocol.messages import (
    CLIENT_DECODER,
    DAEMON_DECODER,
    MAX_PATH,
    Change,
    Changes,
    FromDaemon,
)
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import Table


@pytest.fixture
def domain(table: Table, leases: Leases) -> Domain:
    return Domain(table, leases, lambda reason: table.raise_floor())


class Client:
    """A subscriber's two ends."""

    def __init__(self, path: bytes = b"") -> None:
        client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection: Connection[FromDaemon] = Connection(client, DAEMON_DECODER)
        self.connection.settimeout(0)
        server.setblocking(False)
        self._server = Connection(server, CLIENT_DECODER)
        self.dropped: list[str] = []
        self.subscriber = Subscriber(self._server, path, self.dropped.append)

    def close(self) -> None:
        self.connection.close()
        self._server.close()

    def told(self) -> Iterator[Changes]:
        """What has come and was not read yet."""
        while True:
            try:
                message, _ = self.connection.receive()
            except BlockingIOError:
                return
            assert isinstance(message, Changes)
            yield message

    async def next(self) -> Changes:
        """The next message; waits for it."""
        async with asyncio.timeout(60):
            while True:
                for message in self.told():
                    return message
                await asyncio.sleep(0.005)


def test_nothing_is_noted_while_nobody_wants_to_know(domain: Domain) -> None:
    async def run() -> None:
        events, client = ChangeEvents(domain), Client()
        assert domain.on_change is None
        events.add(client.subscriber)
        assert domain.on_change is not None
        domain.on_change("host", "create", b"/f")
        events.remove(client.subscriber)
        assert domain.on_change is None
        # What nobody was told is not for the next one.
        events.add(client.subscriber)
        domain.on_change("host", "delete", b"/f")
        assert [change.what for change in (await client.next()).changes] == ["delete"]
        events.remove(client.subscriber)
        client.close()

    asyncio.run(run())


def test_equal_changes_that_follow_each_other_are_one(domain: Domain) -> None:
    noted: list[tuple[float, str, What, bytes]] = [
        (1.0, "host", "modify", b"/f"),
        (2.0, "host", "modify", b"/f"),
        (3.0, "red", "modify", b"/f"),
        (4.0, "host", "modify", b"/f"),
    ]
    assert merged(noted) == [
        Change(1.0, "host", "modify", b"/f", 2),
        Change(3.0, "red", "modify", b"/f", 1),
        Change(4.0, "host", "modify", b"/f", 1),
    ]


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        (b"", [b"/srv", b"/srv/a", b"/srvant", b"/"]),
        (b"/", [b"/srv", b"/srv/a", b"/srvant", b"/"]),
        (b"/srv", [b"/srv", b"/srv/a"]),
        (b"/srv/", [b"/srv", b"/srv/a"]),
        (b"/srv/a/b", []),
    ],
)
def test_what_is_under_a_path(path: bytes, seen: list[bytes]) -> None:
    client = Client(path)
    client.subscriber.add([Change(1.0, "host", "attrib", p, 1) for p in (b"/srv", b"/srv/a", b"/srvant", b"/")], 0)
    client.subscriber.tell()
    assert [change.path for message in client.told() for change in message.changes] == seen
    client.close()


def test_who_does_not_read_is_told_how_many_were_missed_and_nothing_else_is_lost() -> None:
    client = Client()
    count = 50_000
    for number in range(count):
        client.subscriber.add([Change(1.0, "host", "modify", b"/%d" % number, 1)], 0)
        if number % 100 == 0:
            client.subscriber.tell()
    assert client.subscriber._kept_bytes <= event_feed.MAX_KEPT_BYTES
    messages: list[Changes] = []
    while client.subscriber.behind:
        messages += client.told()
        client.subscriber.tell()
    messages += client.told()
    shown = [change.path for message in messages for change in message.changes]
    assert shown == [b"/%d" % number for number in range(len(shown))]
    assert [message.missed for message in messages[:-1]] == [0] * (len(messages) - 1)
    assert 0 < messages[-1].missed == count - len(shown)
    # Now that it reads, all is told again.
    client.subscriber.add([Change(1.0, "host", "modify", b"/later", 1)], 0)
    client.subscriber.tell()
    assert [(message.changes[0].path, message.missed) for message in client.told()] == [(b"/later", 0)]
    client.close()


def test_a_subscriber_that_reads_late_is_told_without_a_new_change(domain: Domain) -> None:
    async def run() -> None:
        events, client, quick = ChangeEvents(domain), Client(), Client()
        events.add(client.subscriber)
        events.add(quick.subscriber)
        assert domain.on_change is not None
        for turn in range(2000):
            domain.on_change("host", "modify", b"/%d/" % turn + b"x" * 4000)
        assert (await quick.next()).changes[0].path.startswith(b"/0/")
        assert client.subscriber.behind
        total = 0
        while total < 2000:
            message = await client.next()
            total += len(message.changes) + message.missed
        assert (total, client.subscriber.behind) == (2000, False)
        for one in (client, quick):
            events.remove(one.subscriber)
            one.close()

    asyncio.run(run())


def test_more_changes_than_can_be_noted_at_once(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "MAX_NOTED", 3)

    async def run() -> None:
        events, client = ChangeEvents(domain), Client()
        events.add(client.subscriber)
        assert domain.on_change is not None
        for number in range(10):
            domain.on_change("host", "modify", b"/%d" % number)
        message = await client.next()
        assert (len(message.changes), message.missed) == (3, 7)
        events.remove(client.subscriber)
        client.close()

    asyncio.run(run())


def test_the_longest_names_fit_into_a_packet() -> None:
    client = Client()
    long = b"/" + b"d" * 250 + b"/f" * 50_000
    client.subscriber.add([Change(1e9, "\U0001f600" * 64, "move from", long, 1 << 40) for _ in range(40)], 0)
    client.subscriber.tell()
    paths = [change.path for message in client.told() for change in message.changes]
    assert len(paths) == 40
    assert {len(path) for path in paths} == {MAX_PATH}
    assert all(path.startswith(b"...") and path.endswith(b"/f") for path in paths)
    client.close()


def test_one_that_is_gone_is_dropped_and_the_others_are_told(domain: Domain) -> None:
    async def run() -> None:
        events, gone, client = ChangeEvents(domain), Client(), Client()
        gone.subscriber.drop = lambda reason: events.remove(gone.subscriber)
        events.add(gone.subscriber)
        events.add(client.subscriber)
        gone.connection.close()
        assert domain.on_change is not None
        domain.on_change("red", "create", b"/f")
        assert [change.who for change in (await client.next()).changes] == ["red"]
        events.remove(client.subscriber)
        assert domain.on_change is None
        gone.close()
        client.close()

    asyncio.run(run())


def test_there_are_not_too_many(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_feed, "MAX_SUBSCRIBERS", 1)
    events, one, other = ChangeEvents(domain), Client(), Client()
    events.add(one.subscriber)
    with pytest.raises(UserError, match="1 clients watch changes already"):
        events.add(other.subscriber)
    one.close()
    other.close()
