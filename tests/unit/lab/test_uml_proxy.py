"""What the relay between User-Mode Linux and other backends changes, and what it leaves alone."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.uml_proxy import (
    F_CONFIG,
    FLAG_REPLY,
    GET_CONFIG,
    GET_PROTOCOL_FEATURES,
    SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES,
    Peer,
    relay,
)


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, Peer]]:
    """The two peers of a running relay: User-Mode Linux's end and the backend's."""
    front, front_inside = socket.socketpair()
    back, back_inside = socket.socketpair()

    def run() -> None:
        with front_inside, back_inside, pytest.raises(EOFError):
            relay(Peer(front_inside), Peer(back_inside), getattr(request, "param", None))

    thread = threading.Thread(target=run)
    thread.start()
    with front, back:
        yield Peer(front), Peer(back)
    thread.join(60)
    assert not thread.is_alive()


def test_memory_table_is_trimmed_to_its_regions(ends: tuple[Peer, Peer]) -> None:
    front, back = ends
    with Path(os.devnull).open() as file:
        region = struct.pack("<QQQQ", 0, 4096, 0, 0)
        front.send(SET_MEM_TABLE, 9, struct.pack("<II", 1, 0) + region + bytes(32), [os.dup(file.fileno())])
    request, flags, payload, fds = back.receive()
    assert (request, flags, payload) == (SET_MEM_TABLE, 9, struct.pack("<II", 1, 0) + region)
    assert len(fds) == 1
    os.close(fds[0])


def test_other_messages_pass_unchanged(ends: tuple[Peer, Peer]) -> None:
    front, back = ends
    front.send(1, 1, b"")
    assert back.receive() == (1, 1, b"", [])
    back.send(1, 5, b"12345678")
    assert front.receive() == (1, 5, b"12345678", [])
    back.send(GET_PROTOCOL_FEATURES, 5, bytes(8))
    assert front.receive()[2] == bytes(8)


@pytest.mark.parametrize("ends", ["mytag"], indirect=True)
def test_tag_is_told_for_a_backend_without_configuration(ends: tuple[Peer, Peer]) -> None:
    front, back = ends
    back.send(GET_PROTOCOL_FEATURES, 5, bytes(8))
    assert int.from_bytes(front.receive()[2], "little") == F_CONFIG
    front.send(SET_PROTOCOL_FEATURES, 1, (F_CONFIG | 8).to_bytes(8, "little"))
    assert int.from_bytes(back.receive()[2], "little") == 8
    front.send(GET_CONFIG, 1, struct.pack("<III", 0, 40, 0) + bytes(40))
    request, flags, payload, _ = front.receive()
    assert (request, flags & FLAG_REPLY) == (GET_CONFIG, FLAG_REPLY)
    assert payload[12:] == b"mytag".ljust(36, b"\0") + struct.pack("<I", 1)
