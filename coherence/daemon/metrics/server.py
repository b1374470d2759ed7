"""Serves metrics over HTTP, in the daemon's event loop.

prometheus_client's own servers start threads, which would read the daemon's state while it changes. One kind of
request with one answer needs little: no body, no second request on a connection, and an end for each.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.common.unix_socket import Acceptor

log = get_logger(__name__)

MAX_SCRAPES = 16
MAX_HEAD = 8192
SCRAPE_SECONDS = 5.0
# However many scrape however often, backends are asked for their counters once in this time.
FRESH_SECONDS = 0.5


class MetricsServer:
    """Answers GET /metrics.

    Args:
        listener: a listening stream socket that never waits.
        content_type: of the text.
        gather: makes the text.
    """

    def __init__(self, listener: socket.socket, content_type: str, gather: Callable[[], Awaitable[bytes]]) -> None:
        self._listener = listener
        self._content_type = content_type
        self._gather = gather
        self._gathering = asyncio.Lock()
        self._text = b""
        self._fresh_until = 0.0
        self._scrapes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled, or until the listening socket is shut down."""
        lost = asyncio.Event()
        acceptor = Acceptor(
            self._listener,
            asyncio.get_running_loop(),
            self._accepted,
            "scraper",
            "its socket was shut down: restart coherenced",
            lost.set,
        )
        acceptor.start()
        try:
            await lost.wait()
        finally:
            acceptor.stop()

    def _accepted(self, client: socket.socket) -> None:
        if len(self._scrapes) >= MAX_SCRAPES:
            client.close()
            return
        client.setblocking(False)
        scrape = asyncio.get_running_loop().create_task(self._serve(client))
        self._scrapes.add(scrape)
        scrape.add_done_callback(self._scrapes.discard)

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with client:
            try:
                async with asyncio.timeout(SCRAPE_SECONDS):
                    head = b""
                    while b"\r\n\r\n" not in head and len(head) <= MAX_HEAD:
                        received = await loop.sock_recv(client, MAX_HEAD)
                        if not received:
                            return
                        head += received
                    await loop.sock_sendall(client, await self._answer(head))
            except OSError as error:
                # It is too slow (TimeoutError), or gone.
                log.debug("a scraper was dropped", reason=str(error))

    async def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(head) > MAX_HEAD or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"not a request\n")
        method, target, _ = words
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"only /metrics is here\n")
        if method != b"GET":
            return _response("405 Method Not Allowed", b"only GET\n", "Allow: GET")
        return _response("200 OK", await self._fresh(), f"Content-Type: {self._content_type}")

    async def _fresh(self) -> bytes:
        async with self._gathering:
            if time.monotonic() >= self._fresh_until:
                self._text = await self._gather()
                self._fresh_until = time.monotonic() + FRESH_SECONDS
            return self._text


def _response(status: str, body: bytes, header: str = "Content-Type: text/plain") -> bytes:
    head = f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
