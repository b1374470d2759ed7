"""The front-end against the vhost-user handler with a fake device, and against backends that misbehave."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.guest.vhost_user import FEATURES, PROTOCOL_FEATURES, USER_ADDRESS, FrontEnd, RequestFailed
from coherent_vfs.server.vhost_user.connection import Connection, Disconnected
from coherent_vfs.server.vhost_user.handler import Handler
from coherent_vfs.server.vhost_user.messages import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
    Config,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringState,
    pack_config,
    pack_header,
    pack_u64,
    pack_vring_state,
)
from tests.unit.server.fake_device import FakeDevice, leaked, open_fds

MEMORY = 1 << 20
WAIT = 60.0


class Backend:
    """Serves one front-end after the other with a fake device, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = FakeDevice()
        self.disconnected = threading.Semaphore(0)
        self._stop_read, self._stop_write = os.pipe()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._readable(self._listener.fileno()):
            connection = Connection(self._listener.accept()[0])
            handler = Handler(self.device, connection)
            with contextlib.suppress(Disconnected, ProtocolError):
                while self._readable(connection.fileno()):
                    while (message := connection.receive()) is not None:
                        handler.handle(message)
            handler.close()
            connection.close()
            self.disconnected.release()

    def _readable(self, fd: int) -> bool:
        ready, _, _ = select.select([fd, self._stop_read], [], [], WAIT)
        return self._stop_read not in ready and fd in ready

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        self._listener.close()
        os.close(self._stop_read)
        os.close(self._stop_write)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    before = open_fds()
    backend = Backend(tmp_path / "backend.sock")
    yield backend
    backend.close()
    gc.collect()  # unmaps guest memory
    assert not leaked(before)


def test_negotiation(backend: Backend) -> None:
    with FrontEnd(backend.path, MEMORY) as front_end:
        assert front_end.features == FEATURES
        assert front_end.protocol_features == PROTOCOL_FEATURES
        assert (front_end.tag, front_end.num_request_queues) == ("myshare", 2)
        assert backend.device.accepted == FEATURES
        assert backend.device.memory == [(0, MEMORY, USER_ADDRESS, 0)]


@pytest.mark.parametrize(
    "protocol_features",
    [ProtocolFeature.CONFIG, ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK, PROTOCOL_FEATURES],
)
def test_fewer_features(backend: Backend, protocol_features: ProtocolFeature) -> None:
    with FrontEnd(backend.path, MEMORY, features=VIRTIO_F_VERSION_1, protocol_features=protocol_features) as front_end:
        assert front_end.features == VIRTIO_F_VERSION_1
        front_end.start_queue(1, 64, 0, 0x400, 0x800)
        assert front_end.stop_queue(1) == 0
        assert backend.device.accepted == VIRTIO_F_VERSION_1
        assert backend.device.memory == [(0, MEMORY, USER_ADDRESS, 0)]


def test_memory_is_shared(backend: Backend) -> None:
    with FrontEnd(backend.path, MEMORY) as front_end:
        front_end.memory[4096:4101] = b"hello"
        assert os.pread(front_end.memory_fd, 5, 4096) == b"hello"
        view = memoryview(front_end.memory)
    assert bytes(view[4096:4101]) == b"hello"
    view.release()


def test_queue(backend: Backend) -> None:
    with FrontEnd(backend.path, MEMORY) as front_end:
        doorbells = front_end.start_queue(1, size=64, desc=0x1000, avail=0x1400, used=0x1800, base=5)
        ring = backend.device.rings[1]
        assert (ring.size, ring.base) == (64, 5)
        assert (ring.desc, ring.avail, ring.used) == tuple(USER_ADDRESS + x for x in (0x1000, 0x1400, 0x1800))
        assert backend.device.enabled == {1: True}
        assert ring.kick is not None
        assert ring.call is not None
        os.eventfd_write(doorbells.kick, 3)
        assert os.eventfd_read(ring.kick) == 3
        os.eventfd_write(ring.call, 1)
        assert os.eventfd_read(doorbells.call) == 1
        with pytest.raises(ValueError, match="started already"):
            front_end.start_queue(1, 64, 0x1000, 0x1400, 0x1800)
        backend.device.consumed = 2
        assert front_end.stop_queue(1) == 7
        assert not backend.device.rings
        front_end.start_queue(1, 64, 0x1000, 0x1400, 0x1800, base=7)


def test_queue_that_the_backend_refuses(backend: Backend, expect_log: Callable[[str], None]) -> None:
    expect_log("no ring 7")
    with FrontEnd(backend.path, MEMORY) as front_end:
        with pytest.raises(RequestFailed, match=r"backend\.sock refused SET_VRING_NUM"):
            front_end.start_queue(7, 64, 0, 0x400, 0x800)
        with pytest.raises(RequestFailed):
            front_end.start_queue(7, 64, 0, 0x400, 0x800)


def test_reset(backend: Backend) -> None:
    with FrontEnd(backend.path, MEMORY) as front_end:
        front_end.start_queue(1, 64, 0, 0x400, 0x800)
        backend.device.accepted = None
        front_end.reset()
        assert (backend.device.resets, backend.device.rings) == (1, {})
        assert backend.device.accepted == FEATURES
        front_end.start_queue(1, 64, 0, 0x400, 0x800)


def test_reconnect(backend: Backend) -> None:
    with FrontEnd(backend.path, MEMORY) as front_end:
        front_end.memory[:4] = b"kept"
        for _ in range(3):
            front_end.start_queue(1, 64, 0, 0x400, 0x800)
            front_end.reconnect()
            assert backend.disconnected.acquire(timeout=WAIT)
            assert backend.device.rings == {}
            assert backend.device.memory == [(0, MEMORY, USER_ADDRESS, 0)]
        assert front_end.memory[:4] == b"kept"


def test_backend_drops_everything_when_the_front_end_goes(backend: Backend) -> None:
    front_end = FrontEnd(backend.path, MEMORY)
    front_end.start_queue(1, 64, 0, 0x400, 0x800)
    front_end.close()
    front_end.close()
    assert backend.disconnected.acquire(timeout=WAIT)
    assert (backend.device.rings, backend.device.memory) == ({}, [])


def test_second_front_end_waits_and_says_so(backend: Backend) -> None:
    with (
        FrontEnd(backend.path, MEMORY),
        pytest.raises(UserError, match=r"no answer .* within 0\.05 s: does another front-end use it\?"),
    ):
        FrontEnd(backend.path, MEMORY, timeout=0.05)


def test_backend_closes_the_connection(backend: Backend, expect_log: Callable[[str], None]) -> None:
    expect_log("no ring 9")
    with FrontEnd(backend.path, MEMORY) as front_end:
        with pytest.raises(ConnectionError, match="connection closed") as caught:
            front_end.ask(Request.GET_VRING_BASE, pack_vring_state(VringState(9, 0)))
        assert caught.value.errno == errno.ENOTCONN
        front_end.reconnect()
        assert front_end.tag == "myshare"


def test_backend_goes(tmp_path: Path) -> None:
    backend = Backend(tmp_path / "backend.sock")
    with FrontEnd(backend.path, MEMORY) as front_end:
        front_end.start_queue(1, 64, 0, 0x400, 0x800)
        backend.close()
        for _ in range(2):
            with pytest.raises(ConnectionError, match="lost the backend at"):
                front_end.stop_queue(1)
        with pytest.raises(UserError, match="no backend at"):
            front_end.reconnect()
        with pytest.raises(ConnectionError, match="lost the backend at"):
            front_end.reset()


def test_no_backend(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(UserError, match=f"^no backend at {path}: start vfs-backend$"):
        FrontEnd(path, MEMORY)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with pytest.raises(UserError, match=f"^no backend at {path}: start vfs-backend$"):
        FrontEnd(path, MEMORY)


def test_path_that_is_no_socket_or_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="path too long"):
        FrontEnd(tmp_path / ("x" * 200), MEMORY)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file").chmod(0o600)
    with pytest.raises(UserError, match="file"):
        FrontEnd(tmp_path / "file", MEMORY)


HEADER = {request: pack_header(request, 1 | 4, 8) for request in Request}


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        (b"", "connection closed"),
        (b"HTTP/1.1 400 Bad Request\r\n", "version 3, 1 expected"),
        (HEADER[Request.GET_QUEUE_NUM] + pack_u64(0), "came in reply to GET_FEATURES"),
        (HEADER[Request.GET_FEATURES], "in the middle"),
        (
            pack_header(Request.GET_FEATURES, 1 | 4, 4) + b"1234",
            "does not speak vhost-user: payload of 4 bytes",
        ),
        (
            HEADER[Request.GET_FEATURES]
            + pack_u64(VHOST_USER_F_PROTOCOL_FEATURES)
            + HEADER[Request.GET_PROTOCOL_FEATURES]
            + pack_u64(ProtocolFeature.CONFIG)
            + pack_header(Request.GET_CONFIG, 1 | 4, 13)
            + pack_config(Config(0, b"x")),
            "configuration space of 1 bytes",
        ),
        (HEADER[Request.GET_FEATURES] + pack_u64(0), "no virtio-fs device"),
        (
            HEADER[Request.GET_FEATURES]
            + pack_u64(VHOST_USER_F_PROTOCOL_FEATURES)
            + HEADER[Request.GET_PROTOCOL_FEATURES]
            + pack_u64(0),
            "no configuration space",
        ),
        (
            HEADER[Request.GET_FEATURES]
            + pack_u64(VHOST_USER_F_PROTOCOL_FEATURES)
            + HEADER[Request.GET_PROTOCOL_FEATURES]
            + pack_u64(ProtocolFeature.CONFIG)
            + pack_header(Request.GET_CONFIG, 1 | 4, 0),
            "no virtio-fs device",
        ),
    ],
)
def test_something_else_listens(tmp_path: Path, answers: bytes, text: str) -> None:
    """Whatever answers, the error is one line, and no descriptor stays open."""
    before = open_fds()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "other.sock"))
    listener.listen()

    def answer() -> None:
        peer, _ = listener.accept()
        peer.recv(12)
        peer.sendall(answers)
        peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(4096):
                pass
        peer.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(UserError, match=text) as caught:
        FrontEnd(tmp_path / "other.sock", MEMORY, timeout=WAIT)
    assert "\n" not in str(caught.value)
    thread.join(WAIT)
    listener.close()
    del caught
    gc.collect()  # unmaps guest memory
    assert not leaked(before)
