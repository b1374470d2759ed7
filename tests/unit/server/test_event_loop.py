"""The event loop's timers: each at its time, in order, and no waking in between."""

from __future__ import annotations

import os
import resource
import time

from coherent_vfs.server.device.event_loop import EventLoop


def test_timers_are_called_in_order_and_not_before_their_time() -> None:
    loop = EventLoop()
    called: list[tuple[str, float]] = []
    begun = time.monotonic()

    def note(name: str) -> None:
        called.append((name, time.monotonic() - begun))

    def first() -> None:
        note("first")
        # Earlier than what the timer was set for before.
        loop.call_later(0.01, lambda: note("second"))

    loop.call_later(0.05, lambda: note("third"))
    loop.call_later(0.01, first)
    loop.call_later(0.08, loop.stop)
    loop.run()
    assert [name for name, _ in called] == ["first", "second", "third"]
    for (_, at), least in zip(called, (0.01, 0.02, 0.05), strict=True):
        assert at >= least


def test_timers_that_are_due_do_not_wait() -> None:
    loop = EventLoop()
    loop.call_later(60, loop.stop)
    loop.call_later(0, loop.stop)
    begun = time.monotonic()
    loop.run()
    assert time.monotonic() - begun < 5


def test_a_timer_survives_events_before_it() -> None:
    loop = EventLoop()
    reader, writer = os.pipe()
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(reader, 1))
        if len(seen) < 100:
            os.write(writer, b"x")

    loop.add_reader(reader, read)
    os.write(writer, b"x")
    begun = time.monotonic()
    loop.call_later(0.05, loop.stop)
    loop.run()
    assert len(seen) == 100
    assert 0.05 <= time.monotonic() - begun < 5
    os.close(reader)
    os.close(writer)


def test_waiting_takes_no_processor_time() -> None:
    loop = EventLoop()
    loop.call_later(0.3, loop.stop)
    before = resource.getrusage(resource.RUSAGE_SELF)
    loop.run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1


def test_a_descriptor_that_is_closed_too_early_takes_no_processor_time() -> None:
    """What it was open on is still open elsewhere, and so in the epoll set."""
    loop = EventLoop()
    reader, writer = os.pipe()
    other_reader, other_writer = os.pipe()
    seen: list[bytes] = []
    loop.add_reader(reader, lambda: seen.append(b"closed"))
    loop.add_reader(other_reader, lambda: seen.append(os.read(other_reader, 1)))
    shared = os.dup(reader)
    os.close(reader)
    loop.remove_reader(reader)
    os.write(writer, b"x")
    os.write(other_writer, b"y")
    loop.call_later(0.3, loop.stop)
    before = resource.getrusage(resource.RUSAGE_SELF)
    loop.run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert seen == [b"y"]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1
    for fd in (shared, writer, other_reader, other_writer):
        os.close(fd)
