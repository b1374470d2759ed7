"""The selector that serves one descriptor before the event loop hears of it."""

from __future__ import annotations

import os
import select
import selectors
import time
from collections.abc import Iterator

import pytest

from coherent_vfs.coherence.daemon.watch.selector import FirstSelector


class Pipes:
    """Two pipes; one is to be served first."""

    def __init__(self) -> None:
        self.first, self.to_first = os.pipe()
        self.other, self.to_other = os.pipe()
        self.served: list[bytes] = []
        self.selector = FirstSelector(self.first, lambda: self.served.append(os.read(self.first, 10)))
        self.selector.register(self.first, selectors.EVENT_READ)
        self.selector.register(self.other, selectors.EVENT_READ)

    def ready(self, timeout: float | None) -> list[int]:
        """Which descriptors the loop is told of."""
        return [key.fd for key, _ in self.selector.select(timeout)]

    def close(self) -> None:
        self.selector.close()
        for fd in (self.first, self.to_first, self.other, self.to_other):
            os.close(fd)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


@pytest.mark.parametrize("timeout", [None, 10.0, 0.0, -1.0])
def test_one_is_served_and_the_loop_is_told_of_the_other(pipes: Pipes, timeout: float | None) -> None:
    os.write(pipes.to_first, b"one")
    os.write(pipes.to_other, b"two")
    assert pipes.ready(timeout) == [pipes.other]
    assert pipes.served == [b"one"]
    os.read(pipes.other, 10)
    assert pipes.ready(0) == []
    assert pipes.served == [b"one"]


def test_what_is_not_read_is_served_again(pipes: Pipes) -> None:
    os.write(pipes.to_first, b"more than ten bytes")
    assert pipes.ready(None) == []
    assert pipes.ready(None) == []
    assert pipes.served == [b"more than ", b"ten bytes"]


def test_a_change_that_only_one_look_can_see(pipes: Pipes) -> None:
    """Some descriptors, as that of the mount table, are ready for the first that asks, and not for the next."""
    with select.epoll() as edges:
        edges.register(pipes.other, select.EPOLLIN | select.EPOLLET)
        pipes.selector.unregister(pipes.other)
        pipes.selector.register(edges.fileno(), selectors.EVENT_READ)
        os.write(pipes.to_other, b"two")
        assert pipes.ready(None) == [edges.fileno()]
        pipes.selector.unregister(edges.fileno())


def test_a_peer_that_hangs_up(pipes: Pipes) -> None:
    os.close(pipes.to_other)
    assert pipes.ready(None) == [pipes.other]
    pipes.to_other = os.dup(pipes.other)


def test_what_is_not_registered_is_not_served(pipes: Pipes) -> None:
    pipes.selector.unregister(pipes.first)
    os.write(pipes.to_first, b"one")
    os.write(pipes.to_other, b"two")
    assert pipes.ready(None) == [pipes.other]
    assert pipes.served == []


def test_it_waits(pipes: Pipes) -> None:
    begun = time.monotonic()
    assert pipes.ready(0.02) == []
    assert time.monotonic() - begun >= 0.02


def test_writers_are_told(pipes: Pipes) -> None:
    pipes.selector.register(pipes.to_other, selectors.EVENT_WRITE)
    assert pipes.ready(None) == [pipes.to_other]
