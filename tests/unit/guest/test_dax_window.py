"""The window, and the channel on which a back-end, honest or not, has files mapped there."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from coherent_vfs.guest.vhost_user import PROTOCOL_FEATURES, WINDOW_FEATURES, FrontEnd
from coherent_vfs.guest.window import MAX_SIZE, Window
from coherent_vfs.guest.window_channel import WindowChannel
from coherent_vfs.server.vhost_user.connection import Connection
from coherent_vfs.server.vhost_user.messages import (
    BackendRequest,
    HeaderFlag,
    Message,
    ProtocolFeature,
    SharedMapping,
    pack_shared_mapping,
    unpack_u64,
)
from tests.unit.guest.test_frontend import MEMORY, Backend
from tests.unit.server.fake_device import FakeDevice, leaked, open_fds

PAGE = 4096
SIZE = 4 << 20
MAP, UNMAP = BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP


@pytest.fixture
def window() -> Window:
    """An empty window."""
    return Window(SIZE)


@pytest.fixture
def file() -> Iterator[int]:
    """Descriptor of a file of three pages."""
    fd = os.memfd_create("file")
    for letter in b"abc":
        os.write(fd, bytes([letter]) * PAGE)
    yield fd
    os.close(fd)


def refused(act: Callable[[], object]) -> int | None:
    """The errno of what must fail."""
    with pytest.raises(OSError) as caught:
        act()
    return caught.value.errno


# --- the window ----------------------------------------------------------------------------------


def test_map_and_unmap(window: Window, file: int) -> None:
    whole = window.view(0, SIZE)
    window.map(file, PAGE, 2 * PAGE, 2 * PAGE, writable=True)
    assert bytes(whole[2 * PAGE - 1 : 2 * PAGE + 1]) == b"\0b"
    whole[4 * PAGE - 1 : 4 * PAGE] = b"!"
    os.pwrite(file, b"?", PAGE)
    assert (os.pread(file, 1, 3 * PAGE - 1), bytes(whole[2 * PAGE : 2 * PAGE + 2])) == (b"!", b"?b")
    assert refused(lambda: window.unmap(2 * PAGE, PAGE)) == errno.EINVAL
    assert refused(lambda: window.unmap(3 * PAGE, PAGE)) == errno.EINVAL
    window.unmap(2 * PAGE, 2 * PAGE)
    assert bytes(whole[2 * PAGE : 4 * PAGE]) == bytes(2 * PAGE)
    whole[2 * PAGE] = 1
    assert refused(lambda: window.unmap(2 * PAGE, 2 * PAGE)) == errno.EINVAL
    assert os.pread(file, 1, PAGE) == b"?"


def test_stores_that_are_not_permitted_are_lost(window: Window, file: int) -> None:
    read_only = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    assert refused(lambda: window.map(read_only, 0, 0, PAGE, writable=True)) == errno.EACCES
    window.map(read_only, 0, 0, PAGE, writable=False)
    os.close(read_only)
    view = window.view(0, 2)
    view[0:1] = b"!"
    assert (bytes(view), os.pread(file, 1, 0)) == (b"!a", b"a")


@pytest.mark.parametrize(
    ("offset", "moffset", "length"),
    [
        (0, SIZE, PAGE),
        (0, SIZE - PAGE, 2 * PAGE),
        (0, 0, 2 * SIZE),
        (0, (1 << 64) - PAGE, PAGE),
        (0, PAGE, (1 << 64) - PAGE),
        (0, 0, 0),
        (0, 1, PAGE),
        (0, 0, 100),
        (1, 0, PAGE),
        ((1 << 63) - PAGE, 0, PAGE),
        ((1 << 64) - PAGE, 0, PAGE),
    ],
)
def test_impossible_mappings(window: Window, file: int, offset: int, moffset: int, length: int) -> None:
    assert refused(lambda: window.map(file, offset, moffset, length, writable=True)) == errno.EINVAL
    assert bytes(window.view(0, SIZE)) == bytes(SIZE)


def test_overlap(window: Window, file: int) -> None:
    window.map(file, 0, 4 * PAGE, 2 * PAGE, writable=True)
    for moffset, length in ((4, 2), (4, 1), (5, 1), (3, 2), (5, 2), (3, 4)):
        overlapping = partial(window.map, file, 0, moffset * PAGE, length * PAGE, writable=True)
        assert refused(overlapping) == errno.EEXIST
    window.map(file, 0, 3 * PAGE, PAGE, writable=True)
    window.map(file, 0, 6 * PAGE, PAGE, writable=True)
    assert window.is_mapped(3 * PAGE, 4 * PAGE)
    for moffset, length in ((3, 1), (4, 1), (5, 1), (5, 2), (6, 1)):
        assert window.is_mapped(moffset * PAGE, length * PAGE)
    for moffset, length in ((3, 5), (2, 5), (7, 1), (1023, 1), (1024, 1)):
        assert not window.is_mapped(moffset * PAGE, length * PAGE)
    window.clear()
    assert not window.is_mapped(4 * PAGE, PAGE)
    assert bytes(window.view(0, SIZE)) == bytes(SIZE)


def test_replacing(window: Window, file: int) -> None:
    def shown() -> str:
        return "".join(chr(window.view(page * PAGE, 1)[0] or ord(".")) for page in range(10))

    window.map(file, 0, PAGE, 3 * PAGE, writable=True)
    window.map(file, 0, 4 * PAGE, 3 * PAGE, writable=True)
    assert shown() == ".abcabc..."
    window.replace(file, 0, 3 * PAGE, 2 * PAGE, writable=True)
    assert shown() == ".ababbc..."
    assert window.is_mapped(PAGE, 6 * PAGE)
    window.replace(file, 2 * PAGE, 5 * PAGE, PAGE, writable=True)
    window.replace(file, 0, 8 * PAGE, PAGE, writable=True)
    assert shown() == ".ababcc.a."
    assert refused(lambda: window.map(file, 0, PAGE, PAGE, writable=True)) == errno.EEXIST
    assert refused(lambda: window.unmap(PAGE, 3 * PAGE)) == errno.EINVAL
    for moffset, length in ((1, 2), (3, 2), (5, 1), (6, 1), (8, 1)):
        window.unmap(moffset * PAGE, length * PAGE)
    assert shown() == "." * 10
    assert not window.is_mapped(PAGE, PAGE)


def test_nobody_sees_that_something_is_replaced(window: Window, file: int) -> None:
    """What is the same before and after is there all the time."""
    window.map(file, 0, 0, 3 * PAGE, writable=True)
    view, stop = window.view(0, PAGE), threading.Event()
    seen: set[int] = set()

    def look() -> None:
        while not stop.is_set():
            seen.update(view[:100])

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(500):
        window.replace(file, 0, 0, (1 + number % 3) * PAGE, writable=True)
    stop.set()
    thread.join()
    assert seen == {ord("a")}


def test_what_cannot_be_mapped(window: Window) -> None:
    ends = os.pipe()
    assert refused(lambda: window.map(ends[0], 0, 0, PAGE, writable=False)) in (errno.ENODEV, errno.EACCES)
    for fd in ends:
        os.close(fd)
    assert refused(lambda: window.map(ends[0], 0, 0, PAGE, writable=False)) == errno.EBADF


def test_a_view_outlives_the_window(file: int) -> None:
    window = Window(SIZE)
    window.map(file, 0, 0, PAGE, writable=True)
    part = window.view(0, 100)[1:10]
    del window
    gc.collect()
    assert bytes(part) == b"a" * 9


@pytest.mark.parametrize("size", [0, -PAGE, 100, PAGE + 1, MAX_SIZE + PAGE, 1 << 63])
def test_impossible_windows(size: int) -> None:
    with pytest.raises(ValueError, match=f"window of {size} bytes"):
        Window(size)


# --- the channel ---------------------------------------------------------------------------------


class Asker:
    """A back-end's end of the channel."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(60)
        self.socket = sock

    def ask(self, request: int, payload: bytes, fds: tuple[int, ...] = ()) -> int:
        """The errno that is answered."""
        self.send(request, payload, fds, HeaderFlag.NEED_REPLY)
        header = self.socket.recv(12)
        assert struct.unpack("=III", header) == (request, 1 | HeaderFlag.REPLY, 8)
        return unpack_u64(self.socket.recv(8))

    def send(self, request: int, payload: bytes, fds: tuple[int, ...] = (), flags: int = 0) -> None:
        """Ask for no answer."""
        message = struct.pack("=III", request, 1 | flags, len(payload)) + payload
        socket.send_fds(self.socket, [message], fds)

    @property
    def hung_up(self) -> bool:
        """Whether the other end is closed; waits for that."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def asker(window: Window) -> Iterator[Asker]:
    """A back-end, connected to the window."""
    before, threads = open_fds(), threading.active_count()
    ours, theirs = socket.socketpair()
    channel = WindowChannel(ours, window)
    with theirs:
        yield Asker(theirs)
        channel.close()
        channel.close()
    assert threading.active_count() <= threads
    assert not leaked(before)


def mapping(moffset: int = 0, length: int = PAGE, **more: int) -> bytes:
    """The payload of a writable mapping."""
    return pack_shared_mapping(SharedMapping(moffset, length, writable=True, **more))


def test_requests(asker: Asker, window: Window, file: int) -> None:
    assert asker.ask(MAP, mapping(PAGE, 2 * PAGE, file_offset=PAGE), (file,)) == 0
    assert bytes(window.view(PAGE, 2 * PAGE)) == b"b" * PAGE + b"c" * PAGE
    asker.send(UNMAP, mapping(PAGE, 2 * PAGE))
    asker.send(MAP, mapping(PAGE), (file,))
    assert asker.ask(MAP, mapping(PAGE), (file,)) == errno.EEXIST
    assert bytes(window.view(PAGE, 2 * PAGE)) == b"a" * PAGE + bytes(PAGE)
    assert asker.ask(UNMAP, mapping(PAGE)) == 0
    assert asker.ask(UNMAP, mapping(PAGE)) == errno.EINVAL


def test_a_mapping_replaces_others_where_that_was_agreed_on(window: Window, file: int) -> None:
    ours, theirs = socket.socketpair()
    channel = WindowChannel(ours, window, replaces=True)
    with theirs:
        asker = Asker(theirs)
        assert asker.ask(MAP, mapping(0, 3 * PAGE), (file,)) == 0
        assert asker.ask(MAP, mapping(0, PAGE, file_offset=2 * PAGE), (file,)) == 0
        assert [window.view(page * PAGE, 1)[0] for page in range(3)] == list(b"cbc")
        assert asker.ask(UNMAP, mapping(PAGE, 2 * PAGE)) == 0
        channel.close()


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "status"),
    [
        (MAP, mapping(), 0, errno.EINVAL),
        (MAP, mapping(), 2, errno.EINVAL),
        (MAP, mapping(region=1), 1, errno.EINVAL),
        (MAP, mapping(moffset=SIZE), 1, errno.EINVAL),
        (MAP, mapping()[:-1], 1, errno.EINVAL),
        (MAP, mapping() + b"\0", 1, errno.EINVAL),
        (MAP, b"", 1, errno.EINVAL),
        (MAP, mapping()[:-8] + b"\xff" * 8, 1, errno.EINVAL),
        (UNMAP, mapping(), 1, errno.EINVAL),
        (UNMAP, mapping(region=1), 0, errno.EINVAL),
        (1, b"", 0, errno.ENOSYS),
        (8, mapping(), 1, errno.ENOSYS),
        (999, b"\xff" * 4096, 32, errno.ENOSYS),
    ],
)
def test_bad_requests(
    asker: Asker, window: Window, file: int, request_: int, payload: bytes, fds: int, status: int
) -> None:
    assert asker.ask(request_, payload, (file,) * fds) == status
    assert bytes(window.view(0, SIZE)) == bytes(SIZE)
    assert asker.ask(MAP, mapping(), (file,)) == 0


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("=III", MAP, 1, 1 << 20), b"\xff" * 12])
def test_noise_ends_the_channel(asker: Asker, noise: bytes) -> None:
    asker.socket.sendall(noise)
    assert asker.hung_up


def test_a_backend_that_does_not_read_its_answers(window: Window) -> None:
    """The channel gives up, and the guest can end."""
    ours, theirs = socket.socketpair()
    channel = WindowChannel(ours, window)
    with theirs:
        theirs.settimeout(60)
        request = struct.pack("=III", UNMAP, 1 | HeaderFlag.NEED_REPLY, 40) + mapping()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                theirs.sendall(request)
        channel.close()


# --- the front-end -------------------------------------------------------------------------------


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    """A back-end whose device has a window."""
    before = open_fds()
    backend = Backend(tmp_path / "backend.sock")
    backend.device = FakeDevice(window_bytes=SIZE)
    yield backend
    backend.close()
    gc.collect()  # unmaps guest memory
    assert not leaked(before)


def channel_of(backend: Backend) -> Connection:
    """What the device was given to ask at."""
    fd = backend.device.backend_channel
    assert fd is not None
    return Connection(socket.socket(fileno=os.dup(fd)))


def answered(connection: Connection) -> Message:
    """The next message."""
    os.set_blocking(connection.fileno(), True)
    message = connection.receive()
    assert message is not None
    return message


def test_front_end_with_a_window(backend: Backend, file: int) -> None:
    with FrontEnd(backend.path, MEMORY, protocol_features=PROTOCOL_FEATURES | WINDOW_FEATURES) as front_end:
        for again in range(3):
            window = front_end.window
            assert window is not None
            assert window.size == SIZE
            channel = channel_of(backend)
            channel.send(MAP, mapping(), [file], flags=HeaderFlag.NEED_REPLY)
            assert unpack_u64(answered(channel).payload) == 0
            assert window.is_mapped(0, PAGE)
            if again == 0:
                front_end.reset()
                assert not window.is_mapped(0, PAGE)
            channel.close()
            front_end.reconnect()
            assert front_end.window is not window
        # The guest's memory is where it was.
        assert backend.device.memory[0][1] == MEMORY


@pytest.mark.parametrize(
    "features", [PROTOCOL_FEATURES, PROTOCOL_FEATURES | WINDOW_FEATURES & ~ProtocolFeature.BACKEND_REQ]
)
def test_front_end_that_wants_none(backend: Backend, features: ProtocolFeature) -> None:
    with FrontEnd(backend.path, MEMORY, protocol_features=features) as front_end:
        assert front_end.window is None
        assert backend.device.backend_channel is None


def test_backend_without_a_window(backend: Backend) -> None:
    backend.device = FakeDevice()
    with FrontEnd(backend.path, MEMORY, protocol_features=PROTOCOL_FEATURES | WINDOW_FEATURES) as front_end:
        assert front_end.window is None
