"""A backend's side of the allocator, with a daemon that is slow, full, or wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from coherent_vfs.coherence.client import dax
from coherent_vfs.coherence.client.dax import MAX_CLAIMS, DaxClient
from coherent_vfs.coherence.common.sizes import parse_size, size_text
from coherent_vfs.coherence.protocol.connection import Connection, Dropped, Full
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import (
    TRUNCATE_GRANT_SECONDS,
    Claim,
    Claimed,
    FromBackend,
    FromDaemon,
    Release,
    Revoke,
    Revoked,
    Truncate,
    Truncated,
    TruncateGranted,
    Window,
    Windowed,
)


class Daemon:
    """Connection and event loop of a client."""

    def __init__(self) -> None:
        self.sent: list[FromBackend] = []
        self.later: list[Callable[[], None]] = []
        self.full = False
        self.news = False
        self.client = DaxClient(64 * CHUNK)
        self.client.serve(self)
        self.client.joined(cast(Connection[FromDaemon], self))
        assert self.take() == [Window(64 * CHUNK)]

    def send(self, message: FromBackend, fds: Sequence[int] = ()) -> None:
        """As Connection.send."""
        if self.full:
            raise Full("it does not read its messages")
        self.sent.append(message)

    def has_news(self) -> bool:
        """As Connection.has_news."""
        return self.news

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """As an event loop's."""
        self.later.append(callback)

    def take(self) -> list[FromBackend]:
        """What was sent meanwhile."""
        sent, self.sent = self.sent, []
        return sent

    def claim(self, moffset: int) -> list[tuple[int, int]]:
        """Claim a chunk; the list gets the answer."""
        answers: list[tuple[int, int]] = []
        self.client.claim(1, 2, 0, CHUNK, moffset, True, lambda moffset, error: answers.append((moffset, error)))
        return answers


@pytest.fixture
def daemon() -> Daemon:
    daemon = Daemon()
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    return daemon


def test_so_many_claims_at_a_time(daemon: Daemon) -> None:
    for _ in range(MAX_CLAIMS + 1):
        daemon.claim(0)
    first, *others = daemon.take()
    assert len(others) == MAX_CLAIMS - 1
    assert isinstance(first, Claim)
    daemon.client.handle(Claimed(first.token, 0, errno.EBUSY))
    assert len(daemon.take()) == 1


def test_what_finds_no_room_is_sent_later_in_its_order(daemon: Daemon, expect_log: Callable[[str], None]) -> None:
    expect_log("a release of what was not granted")
    answers = daemon.claim(CHUNK)
    (claim,) = daemon.take()
    assert isinstance(claim, Claim)
    daemon.client.handle(Claimed(claim.token, CHUNK, 0))
    assert answers == [(CHUNK, 0)]
    daemon.full = True
    daemon.client.release([(CHUNK, CHUNK), (CHUNK, CHUNK)])
    daemon.claim(CHUNK)
    assert daemon.take() == []
    daemon.full = False
    daemon.later.pop()()
    assert [type(message) for message in daemon.take()] == [Release, Claim]


def test_a_truncation_that_is_not_wanted_any_more(daemon: Daemon) -> None:
    granted: list[int] = []
    token = daemon.client.truncate(7, 0, lambda: granted.append(1))
    assert daemon.take() == [Truncate(token, 0)]
    daemon.client.truncated(token)
    assert daemon.take() == [Truncated(token)]
    daemon.client.handle(TruncateGranted(token))
    daemon.full = True
    token = daemon.client.truncate(7, 0, lambda: granted.append(1))
    daemon.client.truncated(token)
    daemon.full = False
    daemon.later.pop()()
    assert daemon.take() == []
    assert granted == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's time, seconds."""
    now = [1000.0]
    monkeypatch.setattr(dax, "_now", lambda: now[0])
    return now


def test_a_grant_ends_before_the_daemon_ends_it(daemon: Daemon, clock: list[float]) -> None:
    token = daemon.client.truncate(7, 0, lambda: None)
    assert not daemon.client.is_granted(token)
    clock[0] += 3
    daemon.client.handle(TruncateGranted(token))
    assert daemon.client.is_granted(token)
    # It may have been granted as soon as it was asked for, and read later.
    clock[0] += TRUNCATE_GRANT_SECONDS - 3
    assert not daemon.client.is_granted(token)
    daemon.client.truncated(token)
    assert not daemon.client.is_granted(token)
    daemon.take()
    token = daemon.client.truncate(7, 0, lambda: None)
    clock[0] += TRUNCATE_GRANT_SECONDS
    daemon.client.handle(TruncateGranted(token))
    assert not daemon.client.is_granted(token)


def test_a_grant_ends_with_the_daemon(daemon: Daemon, clock: list[float]) -> None:
    granted: list[int] = []
    token = daemon.client.truncate(7, 0, lambda: granted.append(1))
    daemon.client.handle(TruncateGranted(token))
    daemon.take()
    daemon.client.lost()
    assert not daemon.client.is_granted(token)
    daemon.client.joined(cast(Connection[FromDaemon], daemon))
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    assert daemon.take() == [Window(64 * CHUNK), Truncate(token, 0)]
    assert not daemon.client.is_granted(token)
    daemon.client.handle(TruncateGranted(token))
    assert daemon.client.is_granted(token)
    assert granted == [1, 1]


def test_without_a_daemon_nothing_is_waited_for(daemon: Daemon, clock: list[float]) -> None:
    granted: list[int] = []
    token = daemon.client.truncate(7, 0, lambda: granted.append(1))
    daemon.client.lost()
    daemon.later.pop()()
    assert granted == [1]
    clock[0] += 100
    assert daemon.client.is_granted(token)
    # When it is back it is asked.
    daemon.client.joined(cast(Connection[FromDaemon], daemon))
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    assert not daemon.client.is_granted(token)


def test_what_was_said_and_not_read(daemon: Daemon) -> None:
    assert not daemon.client.has_news
    daemon.news = True
    assert daemon.client.has_news
    daemon.client.lost()
    assert not daemon.client.has_news


def test_a_revocation_for_a_daemon_that_is_gone(daemon: Daemon) -> None:
    pending: list[Callable[[], None]] = []
    daemon.client.attach(lambda device, inode, size, done: pending.append(done), lambda device, inode: None)
    daemon.client.handle(Revoke(1, 2, 3, 0))
    daemon.client.lost()
    daemon.client.joined(cast(Connection[FromDaemon], daemon))
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    pending[0]()
    assert daemon.take() == [Window(64 * CHUNK)]
    daemon.client.handle(Revoke(1, 2, 3, 0))
    pending[1]()
    assert daemon.take() == [Revoked(1)]


@pytest.mark.parametrize("message", [Claimed(99, 0, 0), Windowed(0, 0, 0)])
def test_an_answer_that_nobody_asked_for(daemon: Daemon, message: Claimed | Windowed) -> None:
    with pytest.raises(Dropped):
        daemon.client.handle(message)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("0", "4096", "2m", "64G", "1T")] == [0, 4096, 2 << 20, 64 << 30, 1 << 40]
    assert [size_text(size) for size in (0, 5, 2 << 20, 64 << 30, 3 << 29)] == ["0", "5", "2M", "64G", "1.5G"]
    for text in ("", "G", "-1", "1.5G", "1GB", "٣"):
        with pytest.raises(ValueError, match="use a size such as"):
            parse_size(text)


def test_what_is_released_while_the_daemon_is_told_of_it_is_released(daemon: Daemon) -> None:
    daemon.claim(CHUNK)
    (claim,) = daemon.take()
    assert isinstance(claim, Claim)
    daemon.client.handle(Claimed(claim.token, CHUNK, 0))
    daemon.client.lost()
    daemon.client.joined(cast(Connection[FromDaemon], daemon))
    (window,) = daemon.take()
    assert isinstance(window, Window)
    assert [mapping.moffset for mapping in window.mappings] == [CHUNK]
    daemon.client.release([(CHUNK, CHUNK)])
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    assert daemon.take() == [Release([(CHUNK, CHUNK)])]


def test_a_revocation_ends_with_the_daemon_that_asked_for_it(daemon: Daemon) -> None:
    resized: list[tuple[int, int]] = []
    daemon.client.attach(lambda device, inode, size, done: done(), lambda *file: resized.append(file))
    # Of a file that was mapped, but is not when the next daemon comes.
    daemon.client.handle(Revoke(1, 1, 2, 0))
    assert daemon.take() == [Revoked(1)]
    daemon.client.lost()
    daemon.client.joined(cast(Connection[FromDaemon], daemon))
    daemon.client.handle(Windowed(0, 64 * CHUNK, 0))
    assert resized == [(1, 2)]
