"""Front-ends at the loop: one after the other, and none of them alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from server.loop import EventLoop
from server.sessions import Sessions
from server.vhost_user.messages import HEADER_SIZE, VERSION, Request, pack_header
from tests.unit.server.fake_device import FakeDevice


def test_a_front_end_that_never_stops_asking_does_not_keep_others_waiting(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    loop = EventLoop()
    sessions = Sessions(listener, FakeDevice(), loop)
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
