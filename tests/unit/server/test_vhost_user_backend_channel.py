"""Mappings asked of a front-end: in order, never waited for, whatever the front-end does."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.vhost_user.backend_channel import IN_FLIGHT, MAX_MAPPINGS, MIN_WINDOW, SharedMemory
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.messages import (
    BackendRequest,
    HeaderFlag,
    Message,
    ProtocolError,
    SharedMapping,
    pack_u64,
    unpack_shared_mapping,
)
from tests.unit.server.fake_device import leaked, open_fds

PAGE = 4096
SIZE = 64 << 20
MAP, UNMAP, SEEN = BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP, BackendRequest.SHARED_OBJECT_REMOVE

ExpectLog = Callable[[str], None]


class Bench:
    """Shared memory on a loop of its own, and the front-end's end of its channel."""

    def __init__(self, timeout: float = 5.0) -> None:
        self.loop = EventLoop()
        self.memory = SharedMemory(SIZE, self.loop, timeout=timeout)
        self.memory.on_reset = lambda: self.told.append("reset")
        self.told: list[object] = []
        """What `done` and `on_reset` were called with."""
        self.file = os.memfd_create("file")
        self.memory.start()
        self.connect()

    def connect(self, *, shared_objects: bool = False, replaces: bool = False) -> None:
        ours, theirs = socket.socketpair()
        self.front_end = Connection(theirs)
        self.memory.connect(ours.detach(), shared_objects=shared_objects, replaces=replaces)

    def map(self, page: int = 0, name: str = "map", *, length: int = PAGE, file_offset: int = 0) -> None:
        self.memory.map(
            self.file, file_offset, page * PAGE, length, True, lambda error: self.told.append((name, error))
        )

    def unmap(self, page: int = 0, name: str = "unmap", *, replaced: bool = False) -> None:
        self.memory.unmap(page * PAGE, PAGE, lambda error: self.told.append((name, error)), replaced=replaced)

    def turn(self) -> None:
        """Let the loop go round until it has nothing to do."""
        self.loop.call_later(0, lambda: self.loop.call_later(0, self.loop.stop))
        self.loop.run()

    def run_until(self, told: int) -> None:
        """Let the loop run until so much has been told, for a minute at most."""
        deadline = time.monotonic() + 60
        while len(self.told) < told and time.monotonic() < deadline:
            self.loop.call_later(0.01, self.loop.stop)
            self.loop.run()

    def asked(self) -> list[tuple[int, int]]:
        """The requests that have arrived: their numbers and pages."""
        requests = []
        while (message := self.front_end.receive()) is not None:
            assert message.need_reply
            assert len(message.fds) == (message.request == MAP)
            message.close()
            moffset = 0 if message.request == SEEN else unpack_shared_mapping(message.payload).moffset
            requests.append((message.request, moffset // PAGE))
        return requests

    def answer(self, request: int, status: int = 0) -> None:
        self.front_end.reply(Message(request, 1), pack_u64(status))
        for _ in range(3):
            self.turn()

    def close(self) -> None:
        self.memory.disconnect()
        self.turn()
        self.front_end.close()
        os.close(self.file)


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = open_fds()
    bench = Bench()
    yield bench
    bench.close()
    del bench
    assert not {fd: what for fd, what in leaked(before).items() if not re.search("eventpoll|timerfd", what)}


@pytest.fixture
def impatient() -> Iterator[Bench]:
    bench = Bench(timeout=0.05)
    yield bench
    bench.close()


def test_map_as_it_is_sent(bench: Bench) -> None:
    bench.memory.map(bench.file, 7 * PAGE, 3 * PAGE, 2 * PAGE, False, bench.told.append)
    message = bench.front_end.receive()
    assert message is not None
    assert unpack_shared_mapping(message.payload) == SharedMapping(3 * PAGE, 2 * PAGE, 7 * PAGE, writable=False)
    assert os.fstat(message.fds[0]).st_ino == os.fstat(bench.file).st_ino
    message.close()
    assert bench.told == []
    bench.answer(MAP)
    assert bench.told == [0]


def test_answers_in_order(bench: Bench) -> None:
    bench.map(0, "a")
    bench.unmap(0, "b")
    bench.map(0, "c")
    assert bench.asked() == [(MAP, 0), (UNMAP, 0), (MAP, 0)]
    bench.answer(MAP)
    assert bench.told == [("a", 0)]
    bench.answer(UNMAP, 1)
    bench.answer(MAP)
    assert bench.told == [("a", 0), ("b", errno.EINVAL), ("c", 0)]


def test_more_than_the_channel_takes_at_once(bench: Bench) -> None:
    count = MAX_MAPPINGS
    for page in range(count):
        bench.map(page, f"{page}")
    got: list[tuple[int, int]] = []
    while len(got) < count:
        arrived = bench.asked()
        assert 0 < len(arrived) <= IN_FLIGHT
        got += arrived
        for _ in arrived:
            bench.answer(MAP)
    assert got == [(MAP, page) for page in range(count)]
    assert bench.told == [(f"{page}", 0) for page in range(count)]


def test_no_more_mappings_than_qemu_bears(bench: Bench) -> None:
    for page in range(MAX_MAPPINGS):
        bench.map(page)
        assert bench.asked() == [(MAP, page)]
        bench.answer(MAP)
    bench.map(MAX_MAPPINGS, "one more")
    bench.unmap(0)
    bench.map(0, "in its place")
    bench.turn()
    assert bench.told[-1] == ("one more", errno.ENOSPC)
    assert bench.asked() == [(UNMAP, 0), (MAP, 0)]


@pytest.mark.parametrize("size", [PAGE, MIN_WINDOW // 2, MIN_WINDOW + PAGE, 3 * MIN_WINDOW, -1])
def test_sizes_of_no_window(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SharedMemory(size, EventLoop())


def test_what_cannot_be(bench: Bench) -> None:
    end = SIZE // PAGE
    bench.map(-1)
    bench.map(end)
    bench.map(end - 1, length=2 * PAGE)
    bench.map(length=0)
    bench.map(file_offset=-1)
    bench.map(file_offset=(1 << 63) - 1)
    bench.map(1 << 60)
    assert bench.told == [], "never before it returns"
    bench.turn()
    assert bench.told == [("map", errno.EINVAL)] * 7
    bench.memory.map(-1, 0, 0, PAGE, True, bench.told.append)
    bench.turn()
    assert bench.told[-1] == errno.EBADF
    assert bench.asked() == []


def test_without_a_channel(bench: Bench) -> None:
    bench.memory.disconnect()
    assert not bench.memory.connected
    bench.map()
    bench.unmap()
    bench.turn()
    assert bench.told == [("map", errno.EIO), ("unmap", errno.EIO)]


def test_channel_that_is_no_socket(bench: Bench) -> None:
    with pytest.raises(OSError, match="Socket operation on non-socket"):
        bench.memory.connect(os.memfd_create("no socket"))
    bench.map()
    assert bench.asked() == [(MAP, 0)], "the old channel is still there"


def test_another_channel(bench: Bench) -> None:
    bench.map(0, "old")
    old = bench.front_end
    bench.connect()
    bench.turn()
    bench.map(1, "new")
    assert bench.asked() == [(MAP, 1)]
    bench.answer(MAP)
    assert bench.told == [("old", errno.EIO), ("new", 0)]
    old.close()


def test_front_end_closes_the_channel(bench: Bench) -> None:
    bench.map(0, "a")
    bench.unmap(0, "b")
    bench.front_end.close()
    bench.turn()
    bench.turn()
    assert bench.told == [("a", errno.EIO), ("b", errno.EIO)]
    assert not bench.memory.connected


def test_front_end_that_is_gone_when_asked(bench: Bench) -> None:
    bench.front_end.close()
    bench.map()
    assert not bench.memory.connected
    assert bench.told == [], "never before it returns"
    bench.turn()
    assert bench.told == [("map", errno.EIO)]


NONSENSE = [
    (MAP, HeaderFlag.REPLY, b"1234567", 0),
    (MAP, HeaderFlag.REPLY, b"", 0),
    (MAP, 0, bytes(8), 0),
    (UNMAP, HeaderFlag.REPLY, bytes(8), 1),
    (4711, HeaderFlag.REPLY, bytes(8), 0),
]


@pytest.mark.parametrize(("request_number", "flags", "payload", "fds"), NONSENSE)
def test_nonsense(
    bench: Bench, expect_log: ExpectLog, request_number: int, flags: int, payload: bytes, fds: int
) -> None:
    expect_log("shared memory channel dropped")
    bench.map()
    bench.front_end.send(request_number, payload, [0] * fds, flags=flags)
    bench.turn()
    bench.turn()
    assert bench.told == [("map", errno.EIO)]
    assert not bench.memory.connected


def test_answer_to_nothing(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("no answer to what was asked")
    bench.answer(MAP)
    assert not bench.memory.connected


def test_reset_tells_the_owner_and_then_all_that_wait(bench: Bench) -> None:
    for page in range(IN_FLIGHT + 2):
        bench.map(page)
    bench.memory.reset()
    assert bench.told == ["reset"] + [("map", errno.ECONNRESET)] * (IN_FLIGHT + 2)
    assert len(bench.asked()) == IN_FLIGHT


def test_what_was_mapped_after_it_was_given_up_goes_before_anything_else(bench: Bench) -> None:
    bench.map(0, "old")
    bench.map(1, "old")
    bench.memory.reset()
    bench.map(0, "new")
    assert bench.asked() == [(MAP, 0), (MAP, 1)]
    bench.answer(MAP)
    assert bench.asked() == [], "not before all old ones are answered"
    bench.answer(MAP, 1)
    assert bench.asked() == [(UNMAP, 0), (MAP, 0)]
    bench.answer(UNMAP, 1)
    bench.answer(MAP)
    assert bench.told[3:] == [("new", 0)]


def test_nothing_is_asked_while_the_device_is_stopped(bench: Bench) -> None:
    bench.map(0, "kept")
    bench.answer(MAP)
    bench.asked()
    bench.memory.stop()
    bench.map(1, "given up")
    bench.memory.reset()
    bench.map(0, "new")
    bench.turn()
    assert bench.asked() == []
    bench.memory.start()
    assert bench.asked() == [(UNMAP, 0), (MAP, 0)]
    assert bench.told == [("kept", 0), "reset", ("given up", errno.ECONNRESET)]


def test_a_stopped_device_is_not_silent(impatient: Bench) -> None:
    impatient.memory.stop()
    impatient.map()
    for _ in range(10):
        impatient.loop.call_later(0.02, impatient.loop.stop)
        impatient.loop.run()
    assert impatient.told == []
    impatient.memory._timeout = 60
    impatient.memory.start()
    impatient.answer(MAP)
    assert impatient.told == [("map", 0)]


def test_reset_takes_away_what_was_mapped(bench: Bench) -> None:
    for page in range(3):
        bench.map(page)
        bench.answer(MAP)
    bench.unmap(1)
    bench.answer(UNMAP)
    bench.unmap(0)
    bench.answer(UNMAP, 1)
    bench.asked()
    bench.told.clear()
    bench.memory.reset()
    bench.map(2, "new")
    assert bench.asked() == [(UNMAP, 0), (UNMAP, 2), (MAP, 2)]
    bench.answer(UNMAP, 1)
    bench.answer(UNMAP)
    bench.answer(MAP)
    bench.memory.reset()
    assert bench.asked() == [(UNMAP, 2)]
    assert bench.told == ["reset", ("new", 0), "reset"]


def test_reset_of_more_than_the_channel_takes_at_once(bench: Bench) -> None:
    count = 3 * IN_FLIGHT
    for page in range(count):
        bench.map(page)
        bench.answer(MAP)
    bench.asked()
    bench.memory.reset()
    bench.map(0, "new")
    got: list[tuple[int, int]] = []
    while arrived := bench.asked():
        got += arrived
        for request, _ in arrived:
            bench.answer(request, int(request == UNMAP))
    assert got == [(UNMAP, page) for page in range(count)] + [(MAP, 0)]
    assert bench.told[-1] == ("new", 0)


def test_done_when_the_front_end_has_answered_what_comes_behind(bench: Bench) -> None:
    bench.connect(shared_objects=True)
    bench.map(0, "a")
    bench.unmap(1, "b")
    assert bench.asked() == [(MAP, 0), (SEEN, 0), (UNMAP, 1), (SEEN, 0)]
    bench.answer(MAP)
    assert bench.told == []
    bench.answer(SEEN)
    assert bench.told == [("a", 0)]
    bench.answer(UNMAP, 1)
    assert bench.told == [("a", 0)]
    bench.answer(SEEN, 1)
    assert bench.told == [("a", 0), ("b", errno.EINVAL)]


def test_nothing_comes_between_what_is_replaced_and_what_replaces_it(bench: Bench) -> None:
    bench.connect(shared_objects=True)
    bench.unmap(0, "old", replaced=True)
    bench.map(0, "new")
    assert bench.asked() == [(UNMAP, 0), (MAP, 0), (SEEN, 0)]
    bench.answer(UNMAP)
    assert bench.told == [("old", 0)]
    bench.answer(MAP)
    bench.answer(SEEN)
    assert bench.told == [("old", 0), ("new", 0)]


def test_what_replaces_is_not_held_back(bench: Bench) -> None:
    for page in range(IN_FLIGHT - 1):
        bench.map(page)
    bench.unmap(0, replaced=True)
    bench.map(0)
    bench.map(IN_FLIGHT)
    assert bench.asked() == [(MAP, page) for page in range(IN_FLIGHT - 1)] + [(UNMAP, 0), (MAP, 0)]


def test_a_front_end_that_replaces_is_not_asked_to_take_away_first(bench: Bench) -> None:
    bench.connect(replaces=True)
    bench.map(0, "old", length=8 * PAGE)
    bench.answer(MAP)
    bench.memory.unmap(0, 8 * PAGE, lambda error: bench.told.append(("gone", error)), replaced=True)
    bench.map(0, "file", length=2 * PAGE)
    bench.map(2, "scratch", length=3 * PAGE)
    assert ("gone", 0) not in bench.told, "never before it returns"
    assert bench.asked() == [(MAP, 0), (MAP, 0), (MAP, 2)]
    bench.answer(MAP)
    bench.answer(MAP)
    assert set(bench.told) == {("old", 0), ("gone", 0), ("file", 0), ("scratch", 0)}
    bench.told.clear()
    bench.memory.reset()
    bench.turn()
    assert sorted(bench.asked()) == [(UNMAP, 0), (UNMAP, 2), (UNMAP, 5)], "and what is left of the old one"


def test_reset_while_something_is_replaced(bench: Bench) -> None:
    bench.connect(shared_objects=True)
    bench.unmap(0, "old", replaced=True)
    bench.map(0, "new")
    bench.asked()
    bench.answer(UNMAP)
    bench.memory.reset()
    bench.map(1, "next")
    for request in (MAP, SEEN):
        assert bench.asked() == []
        bench.answer(request)
    assert bench.asked() == [(UNMAP, 0), (SEEN, 0), (MAP, 1), (SEEN, 0)]
    assert bench.told == [("old", 0), "reset", ("new", errno.ECONNRESET)]


def test_given_up_between_the_two_answers(bench: Bench) -> None:
    bench.connect(shared_objects=True)
    bench.map(0, "old")
    bench.answer(MAP)
    bench.asked()
    bench.memory.reset()
    bench.map(0, "new")
    assert bench.asked() == []
    bench.answer(SEEN)
    assert bench.asked() == [(UNMAP, 0), (SEEN, 0), (MAP, 0), (SEEN, 0)]
    for request in (UNMAP, SEEN, MAP, SEEN):
        bench.answer(request)
    assert bench.told == ["reset", ("old", errno.ECONNRESET), ("new", 0)]


@pytest.mark.parametrize("answers", [(SEEN,), (MAP, MAP), (MAP, UNMAP)])
def test_answers_out_of_order(bench: Bench, expect_log: ExpectLog, answers: tuple[BackendRequest]) -> None:
    expect_log("no answer to what was asked")
    bench.connect(shared_objects=True)
    bench.map()
    for request in answers:
        bench.answer(request)
    assert bench.told == [("map", errno.EIO)]


def test_disconnect_tells_all_that_wait(bench: Bench) -> None:
    bench.map()
    bench.memory.disconnect()
    bench.turn()
    assert bench.told == [("map", errno.ECONNRESET)]


def test_requests_from_within_done(bench: Bench) -> None:
    def again(error: int) -> None:
        bench.told.append(error)
        if len(bench.told) < 4:
            bench.memory.unmap(0, PAGE, again)

    bench.memory.unmap(0, PAGE, again)
    bench.answer(UNMAP)
    bench.answer(UNMAP)
    bench.front_end.close()
    bench.run_until(4)
    assert bench.told == [0, 0, errno.EIO, errno.EIO]


def test_silent_front_end(impatient: Bench, expect_log: ExpectLog, caplog: pytest.LogCaptureFixture) -> None:
    expect_log("front-end does not answer")
    impatient.map(0, "a")
    impatient.unmap(1, "b")
    impatient.run_until(2)
    impatient.map(0, "c")
    impatient.run_until(3)
    assert impatient.told == [("a", errno.EIO), ("b", errno.EIO), ("c", errno.EIO)]
    assert caplog.text.count("does not answer") == 1
    assert impatient.asked() == [(MAP, 0), (UNMAP, 1)]


def test_front_end_that_answers_again(impatient: Bench, expect_log: ExpectLog) -> None:
    expect_log("front-end does not answer")
    impatient.map(0, "late")
    impatient.run_until(1)
    impatient.asked()
    impatient.answer(MAP)
    assert impatient.asked() == [(UNMAP, 0)]
    impatient.answer(UNMAP)
    impatient.memory._timeout = 60
    impatient.map(0, "again")
    assert impatient.asked() == [(MAP, 0)]
    impatient.answer(MAP)
    assert impatient.told == [("late", errno.EIO), ("again", 0)]


pages = st.integers(0, 3)
steps = st.one_of(
    st.tuples(st.just("map"), pages),
    st.tuples(st.just("unmap"), pages),
    st.tuples(st.sampled_from(["reset", "turn", "hang up", "start", "stop"])),
    st.tuples(st.just("connect"), st.booleans()),
    st.tuples(st.just("answer"), st.integers(0, 1)),
    st.tuples(st.just("send"), st.sampled_from([7, 9, 10, 0]), st.sampled_from([4, 8, 1]), st.binary(max_size=9)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=40))
def test_random_front_ends(script: list[tuple[Any, ...]]) -> None:
    """Each request ends once, no page is mapped twice without what was there having gone, nothing leaks."""
    logging.disable(logging.WARNING)
    before = open_fds()
    bench = Bench()
    begun = 0
    unanswered: list[tuple[int, int]] = []
    try:
        for step, *arguments in script:
            if step == "map" or step == "unmap":
                getattr(bench, step)(arguments[0], f"{begun}")
                begun += 1
            elif step in ("reset", "start", "stop"):
                getattr(bench.memory, step)()
            elif step == "connect":
                bench.front_end.close()
                unanswered.clear()
                bench.connect(shared_objects=arguments[0])
            elif step == "hang up":
                bench.front_end.close()
            elif step == "turn":
                bench.turn()
            else:
                try:
                    unanswered += bench.asked()
                    if step == "send":
                        bench.front_end.send(arguments[0], arguments[2], flags=arguments[1])
                    elif unanswered:
                        bench.answer(unanswered.pop(0)[0], arguments[0])
                except (ProtocolError, Disconnected):
                    bench.connect()
                    unanswered.clear()
    finally:
        bench.close()
        logging.disable(logging.NOTSET)
    names = [told[0] for told in bench.told if isinstance(told, tuple)]
    assert sorted(names, key=int) == [f"{number}" for number in range(begun)]
    del bench
    assert not {fd: what for fd, what in leaked(before).items() if not re.search("eventpoll|timerfd", what)}
