"""Front-ends at the loop: one after the other, and none of them alone."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coherent_vfs.coherence.common import unix_socket
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.front_ends import FrontEnds
from coherent_vfs.server.vhost_user.messages import HEADER_SIZE, VERSION, Request, pack_header
from tests.unit.server.fake_device import FakeDevice


def test_a_front_end_that_never_stops_asking_does_not_keep_others_waiting(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    loop = EventLoop()
    sessions = FrontEnds(listener, FakeDevice(), loop)
    front_end = socket.socket(socket.AF_UNIX)
    front_end.connect(path)
    loop.call_later(0, loop.stop)
    loop.run()  # accepted

    questions, answer = 100, HEADER_SIZE + 8
    front_end.send(pack_header(Request.GET_FEATURES, VERSION, 0) * questions)
    signal = os.eventfd(1)
    loop.add_reader(signal, loop.stop)
    loop.run()
    answers = len(front_end.recv(1 << 20)) // answer
    assert answers == 1, "one, and then the signal"
    loop.remove_reader(signal)

    def count() -> None:
        nonlocal answers
        answers += len(front_end.recv(1 << 20)) // answer
        if answers == questions:
            loop.stop()

    loop.add_reader(front_end.fileno(), count)
    loop.run()

    sessions.close()
    for end in (front_end, listener):
        end.close()
    os.close(signal)


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    return listener


def run(loop: EventLoop, seconds: float) -> None:
    loop.call_later(seconds, loop.stop)
    loop.run()


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("connected", [False, True])
def test_a_listener_that_is_shut_down_is_left_alone(
    tmp_path: Path, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture, connected: bool
) -> None:
    expect_log("shut down")
    lost: list[str] = []
    loop = EventLoop()
    with listening(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as front_end:
        sessions = FrontEnds(listener, FakeDevice(), loop, lost=lambda: lost.append("lost"))
        if connected:
            front_end.connect(str(tmp_path / "s"))
            run(loop, 0.05)
        listener.shutdown(socket.SHUT_RDWR)
        if connected:
            run(loop, 0.05)
            assert lost == [], "a front-end that is there stays"
            front_end.close()
        before = processor_seconds()
        run(loop, 0.5)
        assert processor_seconds() - before < 0.2
        sessions.close()
    assert lost == ["lost"]
    assert caplog.text.count("no front-end can connect any more") == 1


def test_no_descriptor_for_a_front_end(
    tmp_path: Path,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_log("no front-end can be accepted")
    monkeypatch.setattr(unix_socket, "ACCEPT_AGAIN_SECONDS", 0.1)
    tries: list[float] = []
    short = True

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            tries.append(time.monotonic())
            if short:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    loop = EventLoop()
    with listening(tmp_path / "s") as plain, socket.socket(socket.AF_UNIX) as front_end:
        listener = Listener(fileno=plain.detach())
        sessions = FrontEnds(listener, FakeDevice(), loop)
        front_end.connect(str(tmp_path / "s"))
        run(loop, 0.55)
        assert 2 <= len(tries) <= 6
        assert caplog.text.count("no front-end can be accepted") == 1
        short = False
        run(loop, 0.2)
        front_end.send(pack_header(Request.GET_FEATURES, VERSION, 0))
        run(loop, 0.1)
        assert len(front_end.recv(1 << 10, socket.MSG_DONTWAIT)) == HEADER_SIZE + 8
        sessions.close()
        listener.close()
