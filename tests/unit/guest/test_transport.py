"""Requests of several threads over one queue, whose device answers, is late, cheats, or dies."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from coherent_vfs.guest.ring import Ring
from coherent_vfs.guest.transport import Queue
from coherent_vfs.guest.vhost_user import FrontEnd, QueueDoorbells
from tests.unit.guest.device import Chain, Device

SLOTS = 2
WAIT = 60.0
"""Seconds after which something counts as hanging."""


class FakeFrontEnd:
    """A connection to a device that runs in a thread, if any; the thread is told what to do with each chain."""

    def __init__(self, event_idx: bool = True) -> None:
        self.memory = bytearray(1 << 18)
        self.ring = Ring(self.memory, 0, SLOTS, 4096, 4096, True, event_idx)
        self.device = Device(self.memory, self.ring)
        self.chains: list[Chain] = []
        self._ours, self._theirs = socket.socketpair()
        flags = os.EFD_NONBLOCK
        self.doorbells = QueueDoorbells(kick=os.eventfd(0, flags), call=os.eventfd(0, flags))
        self._event_idx = event_idx
        self._thread: threading.Thread | None = None
        self._stop = os.eventfd(0)

    def start_queue(self, *_: Any) -> QueueDoorbells:
        return self.doorbells

    def stop_queue(self, _: int) -> int:
        return 0

    def fileno(self) -> int:
        return self._ours.fileno()

    def die(self) -> None:
        """Hang up."""
        self._theirs.close()

    def call(self) -> None:
        os.eventfd_write(self.doorbells.call, 1)

    def serve(self, handle: Callable[[Chain], None]) -> None:
        """Have a thread give each chain to handle(), and then call the driver."""

        def run() -> None:
            poll = select.poll()
            poll.register(self.doorbells.kick, select.POLLIN)
            poll.register(self._stop, select.POLLIN)
            while self._stop not in dict(poll.poll()):
                os.eventfd_read(self.doorbells.kick)
                # Ask to be kicked again before looking: what comes later rings.
                self.device.want_kick(True, self._event_idx)
                while self.device.waiting:
                    handle(self.device.take())
                    if self._theirs.fileno() < 0:
                        return
                    self.device.want_kick(True, self._event_idx)
                self.call()

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join()
        for fd in (*vars(self.doorbells).values(), self._stop):
            os.close(fd)
        self._ours.close()
        self._theirs.close()
        self.ring.close()


@pytest.fixture
def front_end() -> Iterator[FakeFrontEnd]:
    """A connection without a device yet."""
    fake = FakeFrontEnd()
    yield fake
    fake.close()


def queue_on(front_end: FakeFrontEnd, timeout: float = WAIT) -> Queue:
    """A queue of the connection."""
    return Queue(cast(FrontEnd, front_end), 1, front_end.ring, timeout)


@pytest.mark.parametrize("event_idx", [False, True])
def test_each_of_many_threads_gets_its_own_reply(event_idx: bool) -> None:
    front_end = FakeFrontEnd(event_idx)
    try:
        front_end.serve(lambda chain: front_end.device.answer(chain, chain.request[::-1] if chain.writable else b""))
        queue = queue_on(front_end)
        finished: list[int] = []

        def work(number: int) -> None:
            for turn in range(200):
                request = b"%d %d" % (number, turn)
                assert queue.exchange(request, b"", b"", 100) == request[::-1]
                queue.post(b"one way", b"")
            finished.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(finished) == list(range(8))
    finally:
        front_end.close()


def test_a_late_reply_is_nobody_elses(front_end: FakeFrontEnd) -> None:
    queue = queue_on(front_end, 0.05)
    with pytest.raises(OSError, match="did not answer in") as raised:
        queue.exchange(b"late", b"", b"", 100)
    assert raised.value.errno == errno.ETIMEDOUT
    late = front_end.device.take()
    front_end.device.answer(late, b"too late")
    queue._timeout = WAIT
    front_end.serve(lambda chain: front_end.device.answer(chain, chain.request))
    for number in range(4 * SLOTS):
        assert queue.exchange(b"%d" % number, b"", b"", 100) == b"%d" % number


def test_a_full_queue_times_out(front_end: FakeFrontEnd) -> None:
    queue = queue_on(front_end, 0.05)
    for _ in range(SLOTS):
        queue.post(b"never used", b"")
    with pytest.raises(OSError, match="did not answer"):
        queue.post(b"no slot", b"")


def test_requests_in_flight_and_later_ones_fail_when_the_device_dies(front_end: FakeFrontEnd) -> None:
    queue = queue_on(front_end)
    errors = []

    def work() -> None:
        try:
            queue.exchange(b"x", b"", b"", 100)
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=work) for _ in range(SLOTS + 2)]
    for thread in threads:
        thread.start()
    front_end.die()
    for thread in threads:
        thread.join(WAIT)
    assert errors == (SLOTS + 2) * [errno.ENOTCONN]
    with pytest.raises(OSError, match="gone"):
        queue.exchange(b"x", b"", b"", 100)


def test_a_reply_that_came_before_the_device_died_counts(front_end: FakeFrontEnd) -> None:
    def answer_and_die(chain: Chain) -> None:
        front_end.device.answer(chain, b"last words")
        front_end.die()

    front_end.serve(answer_and_die)
    queue = queue_on(front_end)
    assert queue.exchange(b"x", b"", b"", 100) == b"last words"
    with pytest.raises(OSError, match="gone"):
        queue.exchange(b"x", b"", b"", 100)


def test_a_device_that_cheats_breaks_the_queue(front_end: FakeFrontEnd) -> None:
    front_end.serve(lambda chain: front_end.device.use(chain.head + 1, 0))
    queue = queue_on(front_end)
    for _ in range(2):
        with pytest.raises(OSError, match="no chain in flight") as raised:
            queue.exchange(b"x", b"", b"", 100)
        assert raised.value.errno == errno.EIO


def test_closing_wakes_those_who_wait(front_end: FakeFrontEnd) -> None:
    queue = queue_on(front_end)
    errors = []

    def work() -> None:
        try:
            queue.exchange(b"x", b"", b"", 100)
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while front_end.device.waiting < 2:
        threading.Event().wait(0.001)
    queue.fail(errno.ENOTCONN, "closed")
    for thread in threads:
        thread.join(WAIT)
    assert errors == 2 * [errno.ENOTCONN]
    queue.stop()
