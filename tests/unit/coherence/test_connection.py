"""Messages over a socket pair."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from coherent_vfs.coherence.daemon.registry import MAX_BACKENDS
from coherent_vfs.coherence.daemon.service import PAGE_BACKENDS
from coherent_vfs.coherence.protocol.connection import MAX_BYTES, Closed, Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    CLIENT_DECODER,
    ENCODER,
    Answer,
    Backend,
    DaxUse,
    FloorReason,
    FromClient,
    Hello,
    Join,
    Ready,
    Status,
    StatusPage,
    Watching,
    Welcome,
)
from tests.unit.server.fake_device import leaked, open_fds

Pair = tuple[socket.socket, Connection[FromClient]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = Connection(right, CLIENT_DECODER, fds=1)
    connection.settimeout(0)
    yield left, connection
    left.close()
    connection.close()


def test_messages_come_whole_and_in_order(pair: Pair) -> None:
    peer = Connection(pair[0], CLIENT_DECODER)
    peer.send(Hello(1, "backend"))
    peer.send(Answer({"requests": (1 << 64) - 1}))
    assert pair[1].receive() == (Hello(1, "backend"), [])
    assert pair[1].receive() == (Answer({"requests": (1 << 64) - 1}), [])
    with pytest.raises(BlockingIOError):
        pair[1].receive()


def test_a_descriptor_comes_along_closed_on_exec(pair: Pair) -> None:
    with Path(os.devnull).open() as null:
        Connection(pair[0], CLIENT_DECODER).send(Ready(), [null.fileno()])
        _, (fd,) = pair[1].receive()
        assert os.path.samestat(os.fstat(fd), os.fstat(null.fileno()))
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_descriptors_with_a_bad_message_or_too_many_are_closed(pair: Pair) -> None:
    with Path(os.devnull).open() as null:
        before = open_fds()
        socket.send_fds(pair[0], [b"\xc1"], [null.fileno()])
        with pytest.raises(Dropped, match="malformed"):
            pair[1].receive()
        for count in (2, 20):
            Connection(pair[0], CLIENT_DECODER).send(Ready(), [null.fileno()] * count)
            with pytest.raises(Dropped, match="too many"):
                pair[1].receive()
        assert not leaked(before)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x80",
        b"\x81\xa4type\xa5hello",
        b"\x91" * 50000,
        b"\x81\xa4type\xa3wat",
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_a_malformed_message_is_dropped(pair: Pair, data: bytes) -> None:
    pair[0].send(data)
    with pytest.raises(Dropped, match="malformed"):
        pair[1].receive()


def test_a_message_of_the_other_side_is_dropped(pair: Pair) -> None:
    Connection(pair[0], CLIENT_DECODER).send(Welcome(1, b""))
    with pytest.raises(Dropped, match="malformed"):
        pair[1].receive()


def test_an_oversized_message_is_dropped(pair: Pair) -> None:
    pair[0].send(bytes(MAX_BYTES + 1))
    with pytest.raises(Dropped, match="more than"):
        pair[1].receive()


def test_a_peer_that_does_not_read_is_dropped(pair: Pair) -> None:
    with pytest.raises(Dropped, match="does not read"):
        for _ in range(100_000):
            pair[1].send(Ready())


def test_a_closed_peer_is_told_from_a_bad_one(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(Closed):
        pair[1].receive()
    with pytest.raises(Closed):
        pair[1].send(Ready())


def test_the_peer_is_who_the_kernel_says(pair: Pair) -> None:
    assert pair[1].peer() == (os.getpid(), os.getuid())


def test_a_status_page_fits_a_packet_whatever_the_backends_are_called() -> None:
    highest, longest = (1 << 64) - 1, "\U0001f600" * 64
    counters = {chr(0x10000 + number) + longest[1:]: highest for number in range(32)}
    backend = Backend(highest, longest, longest, highest, highest, 1.5, counters)
    status = Status(
        table="/dev/shm/" + "x" * 200,
        domain="f" * 32,
        pid=highest,
        seconds=1.5,
        slots=highest,
        sequence=highest,
        floor=highest,
        trusted=False,
        removed=False,
        roots=highest,
        missing=[highest] * MAX_BACKENDS,
        outside=[highest] * MAX_BACKENDS,
        bumps_per_second=1.5,
        floor_raises=dict.fromkeys(get_args(FloorReason), highest),
        distrusts=highest,
        watch=Watching("fanotify", *[highest] * 8),
        dax=DaxUse(*[highest] * 8),
    )
    page = StatusPage(status, [backend] * PAGE_BACKENDS, highest)
    assert len(ENCODER.encode(page)) <= MAX_BYTES


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\x1b[2J", "\x9b2J"])
def test_a_name_that_would_play_tricks_on_a_terminal_is_dropped(pair: Pair, name: str) -> None:
    pair[0].send(ENCODER.encode(Join(name, "none")))
    with pytest.raises(Dropped, match="malformed"):
        pair[1].receive()
