"""Metrics: addresses, names, and scrapers that are slow or hostile."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coherent_vfs.coherence.common import unix_socket
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.metrics import server
from coherent_vfs.coherence.daemon.metrics.address import Address, listen, parse
from coherent_vfs.coherence.daemon.metrics.families import render
from coherent_vfs.coherence.daemon.metrics.server import MetricsServer
from coherent_vfs.coherence.protocol.messages import Backend, DaxUse, Status, Watching

STATUS = Status(
    table="/dev/shm/vt",
    domain="00",
    pid=1,
    seconds=1.0,
    slots=1024,
    sequence=77,
    floor=0,
    trusted=True,
    removed=False,
    roots=1,
    missing=[4],
    outside=[],
    bumps_per_second=0.0,
    floor_raises={"trusted": 2, "mount": 0},
    distrusts=1,
    watch=Watching("inotify", 7, 10, 3, 1, 33, 20, 10, 3),
    dax=DaxUse(2, 128 << 30, 64 << 30, 7, 14 << 20, 256 << 30, 3, 5),
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9999", ("127.0.0.1", 9999)),
        ("[::1]:1", ("::1", 1)),
        ("[0:0:0:0:0:0:0:1]:0", ("::1", 0)),
        ("/run/m.sock", Path("/run/m.sock")),
        ("./m:1", Path("m:1")),
    ],
)
def test_an_address(text: str, address: object) -> None:
    assert parse(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "9999", ":9999", "localhost:9999", "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.300:1"),
        *("::1:9999", "[::1]", "[127.0.0.1]:1", "[:::1]:1", "127.0.0.1:٣", "metrics.sock"),
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"use one such as 127\.0\.0\.1:9999"):
        parse(text)


def test_a_port_in_use() -> None:
    with listen(("127.0.0.1", 0)) as sock, pytest.raises(UserError, match=r"port \d+: Address already in use: choose"):
        listen(sock.getsockname())


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UserError, match=r"metrics at 192\.0\.2\.1 port 1: Cannot assign requested address"):
        listen(("192.0.2.1", 1))


def test_a_path_in_use(tmp_path: Path) -> None:
    with listen(tmp_path / "m"), pytest.raises(UserError, match=r"in use by another process.*--metrics"):
        listen(tmp_path / "m")
    # Left by a daemon that was killed.
    listen(tmp_path / "m").close()


def test_a_path_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--metrics"):
        listen(Path("/proc/nowhere/m"))


def test_names_and_values() -> None:
    backends = [
        Backend(5, "red", "shared", 1, 2, 9.0, {"requests": 100, "held": 3, "parked": 1, "aware": 0, "secret": 9}),
        Backend(6, "red", "auto", 1, 2, 9.0, {"requests": 7}),
        Backend(8, 'a"b\\c\u2028', "shared", 1, 2, 9.0, None),
    ]
    families = list(text_string_to_metric_families(render(STATUS, backends).decode()))
    assert all(family.documentation.endswith(".") for family in families)
    assert all(family.name.startswith("coherenced_") for family in families)
    values = {(sample.name, *sample.labels.values()): sample.value for f in families for sample in f.samples}
    assert len(values) == sum(len(family.samples) for family in families)
    assert values["coherenced_bumps_total",] == 77
    assert [values["coherenced_floor_raises_total", reason] for reason in ("trusted", "mount")] == [2, 0]
    assert values["coherenced_gone_changes_total",] == 3
    assert values["coherenced_host_changes_total",] == 20
    assert values["coherenced_watches",] == 7
    assert values["coherenced_trusted",] == 1
    assert values["coherenced_dax_windows",] == 2
    assert values["coherenced_dax_mapped_bytes",] == 14 << 20
    assert values["coherenced_missing_backends",] == 1
    assert values["coherenced_backend_requests_total", "red", "5"] == 100
    assert values["coherenced_backend_requests_total", "red", "6"] == 7
    assert values["coherenced_backend_held_changes_total", "red", "5"] == 3
    assert values["coherenced_backend_parked_requests", "red", "5"] == 1
    assert values["coherenced_backend_info", "auto", "red", "6"] == 1
    assert values["coherenced_backend_answered", 'a"b\\c\u2028', "8"] == 0
    assert not [name for name in values if "secret" in name[0]]


class Scraped:
    """A server, and how often its text was made."""

    def __init__(self, address: Address = ("127.0.0.1", 0)) -> None:
        self.listener = listen(address)
        # Far less than what is sent, also to one that does not read.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.server = MetricsServer(self.listener, "text/x", self.text)
        self.gathered = 0

    async def text(self) -> bytes:
        """What is scraped."""
        self.gathered += 1
        return b"x" * 300_000

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        host, port = self.listener.getsockname()
        return await asyncio.open_connection(host, port)

    async def get(self, request: bytes = b"GET /metrics HTTP/1.1\r\n\r\n") -> bytes:
        """All that it answers."""
        reader, writer = await self.open()
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer


def with_server(test: Callable[[Scraped], Awaitable[None]]) -> None:
    """Run a test beside a server."""

    async def run() -> None:
        # The daemon ends on an error that nobody has caught.
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        scraped = Scraped()
        serving = asyncio.create_task(scraped.server.run())
        async with asyncio.timeout(60):
            await test(scraped)
        assert not serving.done()
        serving.cancel()
        scraped.listener.close()
        assert not failures

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * server.MAX_HEAD, b"400"),
    ],
)
def test_requests(request_: bytes, status: bytes) -> None:
    async def test(scraped: Scraped) -> None:
        head, _, body = (await scraped.get(request_)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        assert b"Content-Length: %d\r\n" % len(body) in head
        assert (b"Content-Type: text/x" in head) == (status == b"200")

    with_server(test)


def test_backends_are_not_asked_more_often_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FRESH_SECONDS", 60)

    async def test(scraped: Scraped) -> None:
        answers = await asyncio.gather(*(scraped.get() for _ in range(8)))
        assert len({len(answer) for answer in answers}) == 1
        assert scraped.gathered == 1

    with_server(test)


def test_who_is_too_slow_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SCRAPE_SECONDS", 0.2)

    async def test(scraped: Scraped) -> None:
        silent, _ = await scraped.open()
        assert await silent.read() == b""
        # One that asks, and does not read what it asked for.
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(scraped.listener.getsockname())
            deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            while not scraped.server._scrapes:
                await asyncio.sleep(0.005)
            while scraped.server._scrapes:
                await asyncio.sleep(0.005)
        monkeypatch.undo()
        assert (await scraped.get()).startswith(b"HTTP/1.1 200")

    with_server(test)


def test_who_hangs_up_hurts_nobody() -> None:
    async def test(scraped: Scraped) -> None:
        for request in (b"", b"GET", b"GET /metrics HTTP/1.1\r\n\r\n"):
            _, writer = await scraped.open()
            writer.write(request)
            writer.transport.abort()
        assert (await scraped.get()).startswith(b"HTTP/1.1 200")

    with_server(test)


def test_there_are_not_too_many_at_once() -> None:
    async def test(scraped: Scraped) -> None:
        idle = [await scraped.open() for _ in range(server.MAX_SCRAPES)]
        while len(scraped.server._scrapes) < server.MAX_SCRAPES:
            await asyncio.sleep(0.005)
        late, late_writer = await scraped.open()
        assert await late.read() == b""
        late_writer.close()
        for _, writer in idle:
            writer.close()
        while scraped.server._scrapes:
            await asyncio.sleep(0.005)
        assert (await scraped.get()).startswith(b"HTTP/1.1 200")

    with_server(test)


@pytest.mark.parametrize("address", [("127.0.0.1", 0), Path("m")])
def test_a_listener_that_is_shut_down_is_left_alone(
    address: Address,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expect_log("no scraper can connect any more")
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        scraped = Scraped(address)
        serving = asyncio.get_running_loop().create_task(scraped.server.run())
        await asyncio.sleep(0.05)
        scraped.listener.shutdown(socket.SHUT_RDWR)
        before = processor_seconds()
        await asyncio.sleep(0.5)
        assert processor_seconds() - before < 0.2
        serving.cancel()
        scraped.listener.close()

    asyncio.run(run())
    assert caplog.text.count("no scraper can connect any more") == 1


def test_no_descriptor_for_a_scraper(
    expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("no scraper can be accepted")
    monkeypatch.setattr(unix_socket, "ACCEPT_AGAIN_SECONDS", 0.05)
    tries = 0

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries <= 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def run() -> None:
        scraped = Scraped()
        listener = Listener(fileno=scraped.listener.detach())
        scraped.listener = listener
        scraped.server = MetricsServer(listener, "text/x", scraped.text)
        serving = asyncio.get_running_loop().create_task(scraped.server.run())
        begun = time.monotonic()
        assert b" 200 OK" in await scraped.get()
        assert time.monotonic() - begun > 0.1
        serving.cancel()
        listener.close()

    asyncio.run(run())
    assert caplog.text.count("no scraper can be accepted") == 1


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
