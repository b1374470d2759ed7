"""Framing of vhost-user messages on a stream socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.messages import MAX_FDS, Message, ProtocolError, pack_header
from tests.unit.server.fake_device import leaked, open_fds


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, send_timeout=0.05)
    yield connection, theirs
    connection.close()
    theirs.close()


def receive_all(connection: Connection) -> list[Message]:
    received = []
    while (message := connection.receive()) is not None:
        received.append(message)
    return received


def test_nothing_there_yet(pair: tuple[Connection, socket.socket]) -> None:
    assert pair[0].receive() is None


def test_messages_arrive_whatever_the_pieces(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    stream = pack_header(1, 1, 0) + pack_header(2, 9, 8) + b"12345678" + pack_header(3, 1, 3) + b"abc"
    received = []
    for i in range(len(stream)):
        peer.send(stream[i : i + 1])
        received += receive_all(connection)
    peer.send(stream)
    received += receive_all(connection)
    assert received == [Message(1, 1), Message(2, 9, b"12345678"), Message(3, 1, b"abc")] * 2


def test_descriptors_stay_with_their_message(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    pipes = [os.pipe() for _ in range(2)]
    for request, fds in enumerate(pipes, 1):
        socket.send_fds(peer, [pack_header(request, 1, 2)], list(fds))
        peer.send(b"xy")
    peer.send(pack_header(3, 1, 0))
    first, second, third = receive_all(connection)
    for message, fds in ((first, pipes[0]), (second, pipes[1])):
        assert [os.fstat(fd).st_ino for fd in message.fds] == [os.fstat(fd).st_ino for fd in fds]
        assert not any(os.get_inheritable(fd) for fd in message.fds)
        message.close()
        for fd in fds:
            os.close(fd)
    assert third.fds == []


def test_descriptors_of_an_unfinished_message_are_closed(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    before = open_fds()
    socket.send_fds(peer, [pack_header(1, 1, 8)], [0, 1, 2])
    assert connection.receive() is None
    assert len(leaked(before)) == 3
    connection.close()
    assert not leaked(before)


def test_too_many_descriptors(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    socket.send_fds(peer, [pack_header(1, 1, 0)], [0] * (MAX_FDS + 1))
    with pytest.raises(ProtocolError, match="more than 32 file descriptors"):
        connection.receive()


def test_too_many_descriptors_spread_over_the_message(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    socket.send_fds(peer, [pack_header(1, 1, 4)], [0] * MAX_FDS)
    socket.send_fds(peer, [b"1234"], [0])
    with pytest.raises(ProtocolError, match="more than 32 file descriptors"):
        connection.receive()


def test_end_of_stream_between_messages(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.send(pack_header(1, 1, 0))
    peer.close()
    assert connection.receive() == Message(1, 1)
    with pytest.raises(Disconnected):
        connection.receive()


@pytest.mark.parametrize("piece", [pack_header(1, 1, 8)[:5], pack_header(1, 1, 8), pack_header(1, 1, 8) + b"1"])
def test_end_of_stream_within_a_message(pair: tuple[Connection, socket.socket], piece: bytes) -> None:
    connection, peer = pair
    peer.send(piece)
    peer.close()
    with pytest.raises(ProtocolError, match="in the middle of a message"):
        connection.receive()


def test_reset_connection(pair: tuple[Connection, socket.socket]) -> None:
    """A peer that goes without reading what was sent to it resets the connection."""
    connection, peer = pair
    connection.send(1)
    peer.close()
    with pytest.raises(ProtocolError, match="connection lost"):
        connection.receive()


def test_reply_carries_the_request_and_the_reply_flag(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    connection.reply(Message(15, 9), b"12345678")
    assert peer.recv(100) == pack_header(15, 1 | 4, 8) + b"12345678"


def test_send_passes_descriptors_once(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    other = Connection(peer)
    connection.send(5, b"x" * 4096, [0, 1])
    connection.send(6)
    first, second = receive_all(other)
    assert (first.payload, len(first.fds), second.fds) == (b"x" * 4096, 2, [])
    first.close()


def test_peer_that_does_not_read(pair: tuple[Connection, socket.socket]) -> None:
    connection, _peer = pair
    with pytest.raises(ProtocolError, match="does not read"):
        for _ in range(100_000):
            connection.send(1, b"x" * 4096)


def test_peer_that_is_gone(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.close()
    with pytest.raises(ProtocolError, match="connection lost"):
        connection.send(1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=64), st.integers(0, 3)), max_size=10))
def test_random_bytes_and_descriptors(pieces: list[tuple[bytes, int]]) -> None:
    """Nothing but ProtocolError comes of them, and no descriptor stays open."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    try:
        for data, fds in pieces:
            socket.send_fds(theirs, [data], [0] * fds)
            for message in receive_all(connection):
                message.close()
    except ProtocolError:
        pass
    finally:
        connection.close()
        theirs.close()
    assert not leaked(before)
