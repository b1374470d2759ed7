"""QEMU 11.1 maps files into a guest's window as the backend asks, and what it refuses (docs/reference/vhost-user.md).

Without FUSE: the backend asks by itself, and a program in the guest looks at the window's memory.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.server.dax.view import View
from coherent_vfs.server.device.device import FsDevice
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.front_ends import FrontEnds
from coherent_vfs.server.settings import Settings
from tests.lab import assets
from tests.lab.guest import Guest, boot
from tests.lab.paths import LabError

PROGRAM = Path(__file__).with_name("programs") / "window"
PAGE = 4096
CHUNK = 2 << 20
WINDOW = 256 << 20

Ask = Callable[[Callable[[int], object]], None]


class Backend:
    """A device with a window, served by a thread, that maps what the test says.

    Args:
        share: a directory to serve.
        path: where to listen.
    """

    def __init__(self, share: Path, path: Path) -> None:
        self._root_fd = os.open(share, os.O_PATH)
        self._loop = EventLoop()
        settings = Settings(shared_dir=share, root_fd=self._root_fd, tag="share", window_bytes=WINDOW)
        self.device = FsDevice(settings, self._loop)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._sessions = FrontEnds(self._listener, self.device, self._loop)
        self._calls: deque[Callable[[], object]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._loop.add_reader(self._woken.fileno(), self._call)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()

    def begin(self, *asks: Ask) -> Callable[[], list[int]]:
        """Ask all of it at once; what is returned waits for it, and gives the errnos."""
        errors: dict[int, int] = {}
        answered = threading.Event()

        def done(number: int, error: int) -> None:
            errors[number] = error
            if len(errors) == len(asks):
                answered.set()

        def ask_all() -> None:
            for number, ask in enumerate(asks):
                ask(lambda error, number=number: done(number, error))  # type: ignore[misc]

        def wait() -> list[int]:
            assert answered.wait(30)
            return [errors[number] for number in range(len(asks))]

        self.soon(ask_all)
        return wait

    def do(self, *asks: Ask) -> list[int]:
        """Ask all of it at once; the errnos."""
        return self.begin(*asks)()

    def map(self, fd: int, moffset: int, offset: int = 0, length: int = CHUNK, *, writable: bool = True) -> Ask:
        return lambda done: self.device.shared_memory.map(fd, offset, moffset, length, writable, done)

    def unmap(self, moffset: int, length: int = CHUNK) -> Ask:
        return lambda done: self.device.shared_memory.unmap(moffset, length, done)

    def soon(self, call: Callable[[], object]) -> None:
        """Call it in the thread."""
        self._calls.append(call)
        self._wake.send(b"x")

    def close(self) -> None:
        self.soon(self._loop.stop)
        self._thread.join(10)
        self._sessions.close()
        self.device.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()
        os.close(self._root_fd)

    def _call(self) -> None:
        self._woken.recv(1)
        self._calls.popleft()()


class Monitor:
    """QEMU's human monitor on a socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._prompt()

    def __call__(self, command: str) -> str:
        self._socket.send(command.encode() + b"\n")
        return self._prompt()

    def close(self) -> None:
        self._socket.close()

    def _prompt(self) -> str:
        said = b""
        while not said.endswith(b"(qemu) "):
            said += self._socket.recv(1 << 16)
        return said.decode()


class Machine:
    """A guest with a window, its backend, its monitor."""

    def __init__(self, guest: Guest, backend: Backend, monitor: Monitor) -> None:
        self.guest, self.backend, self.monitor = guest, backend, monitor
        length, address = self.guest.check("dmesg | sed -n 's/.*Cache len: //p'").decode().split("@")
        assert int(length, 16) == WINDOW
        self._address = int(address, 16)

    def look(self, moffset: int, length: int) -> bytes:
        """What the guest sees there."""
        return self.guest.check(f"/window {self._address + moffset} {length}")

    def store(self, moffset: int, text: str) -> None:
        """Have the guest write there."""
        self.guest.check(f"/window {self._address + moffset} - {text}")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    try:
        assets.qemu_dax()
    except LabError as error:
        pytest.skip(str(error))
    program = assets.compile_static(PROGRAM).read_bytes()
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        share = Path(folder, "share")
        share.mkdir()
        backend = Backend(share, Path(folder, "socket"))
        try:
            with boot(
                "qemu-dax",
                shares={"share": Path(folder, "socket")},
                append="iomem=relaxed",
                files={"window": (0o100755, program)},
                extra=["-monitor", f"unix:{folder}/monitor,server,nowait"],
            ) as vm:
                monitor = Monitor(Path(folder, "monitor"))
                yield Machine(vm, backend, monitor)
                monitor.close()
        finally:
            backend.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Eight chunks that begin with their number."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8 * CHUNK)
    for number in range(8):
        os.pwrite(fd, f"chunk {number}".encode(), number * CHUNK)
    yield fd
    os.close(fd)


def test_guest_and_host_see_each_other(machine: Machine, file: int) -> None:
    backend = machine.backend
    assert backend.do(backend.map(file, 0, 3 * CHUNK)) == [0]
    assert machine.look(0, 7) == b"chunk 3"
    os.pwrite(file, b"changed", 3 * CHUNK)
    assert machine.look(0, 7) == b"changed"
    machine.store(100, "by-the-guest")
    assert os.pread(file, 12, 3 * CHUNK + 100) == b"by-the-guest"
    assert "virtio-shmem-0-0" in machine.monitor("info mtree")
    assert backend.do(backend.unmap(0)) == [0]
    assert machine.look(0, 7) == bytes(7)
    assert "virtio-shmem-0-0" not in machine.monitor("info mtree")


def test_many_at_once_and_in_order(machine: Machine, file: int) -> None:
    backend = machine.backend
    moffsets = [number * CHUNK for number in range(64)]
    assert set(backend.do(*(backend.map(file, moffset, moffset % (8 * CHUNK)) for moffset in moffsets))) == {0}
    assert machine.look(13 * CHUNK, 7) == b"chunk 5"
    exchange = [backend.unmap(0), backend.map(file, 0, CHUNK), backend.unmap(0), backend.map(file, 0, 2 * CHUNK)]
    assert backend.do(*exchange) == [0] * 4
    assert machine.look(0, 7) == b"chunk 2"
    assert set(backend.do(*(backend.unmap(moffset) for moffset in moffsets))) == {0}


def test_what_qemu_refuses(machine: Machine, file: int, tmp_path: Path) -> None:
    backend = machine.backend
    refused = [errno.EINVAL]
    assert backend.do(backend.map(file, 0), backend.map(file, CHUNK)) == [0, 0]
    assert backend.do(backend.map(file, 0)) == refused, "what is mapped already"
    assert backend.do(backend.map(file, CHUNK - PAGE, length=PAGE)) == refused
    assert backend.do(backend.unmap(0, PAGE)) == refused, "a part"
    assert backend.do(backend.unmap(0, 2 * CHUNK)) == refused, "two"
    assert backend.do(backend.unmap(8 * CHUNK)) == refused, "nothing"
    assert backend.do(backend.unmap(0), backend.unmap(CHUNK)) == [0, 0]
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    short = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    os.write(short, b"short" * 2000)
    try:
        for writable in (False, True):
            assert backend.do(backend.map(read_only, 0, writable=writable)) == refused
        assert backend.do(backend.map(short, 0)) == refused, "shorter than the mapping"
        assert os.fstat(short).st_size == 10_000
        assert backend.do(backend.map(short, 0, length=2 * PAGE)) == [0]
        assert machine.look(0, 10) == b"shortshort"
        assert backend.do(backend.unmap(0, 2 * PAGE)) == [0]
    finally:
        os.close(read_only)
        os.close(short)


def test_views_have_no_end(machine: Machine, tmp_path: Path) -> None:
    backend = machine.backend
    with View() as view:
        if not view.available:
            pytest.skip(f"no DAX: {view.reason}")
        real = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
        os.write(real, b"short" * 2000)
        seen = view.open(real)
        assert backend.do(backend.map(seen, 0)) == [0]
        os.close(seen)
        assert machine.look(9990, 20) == b"short" * 2 + bytes(10)
        os.pwrite(real, b"longer", 10_000)
        assert machine.look(9995, 11) == b"shortlonger"
        assert os.fstat(real).st_size == 10_006
        assert backend.do(backend.unmap(0)) == [0]
        os.close(real)


def test_paused_machine_keeps_its_mappings_and_is_asked_later(machine: Machine, file: int) -> None:
    backend = machine.backend
    assert backend.do(backend.map(file, 0)) == [0]
    machine.monitor("stop")
    later = backend.begin(backend.map(file, CHUNK, CHUNK))
    machine.monitor("cont")
    assert later() == [0]
    assert (machine.look(0, 7), machine.look(CHUNK, 7)) == (b"chunk 0", b"chunk 1")
    assert backend.do(backend.unmap(0), backend.unmap(CHUNK)) == [0, 0]


def test_reset_by_us(machine: Machine, file: int) -> None:
    """As when a session begins: what was mapped goes before anything else is mapped."""
    backend = machine.backend
    assert backend.do(backend.map(file, 0), backend.map(file, CHUNK)) == [0, 0]
    backend.soon(backend.device.shared_memory.reset)
    assert backend.do(backend.map(file, 0, 4 * CHUNK)) == [0]
    assert (machine.look(0, 7), machine.look(CHUNK, 7)) == (b"chunk 4", bytes(7))
    assert backend.do(backend.unmap(0)) == [0]


def test_driver_that_is_bound_again(machine: Machine, file: int) -> None:
    """Not with mappings: QEMU 11.1 dies of that when the driver starts the device (docs/reference/vhost-user.md)."""
    backend = machine.backend
    machine.guest.check("cd /sys/bus/virtio/drivers/virtiofs && for d in virtio?; do echo $d > unbind; done")
    later = backend.begin(backend.map(file, 0))
    machine.guest.check(
        "cd /sys/bus/virtio/drivers/virtiofs && for d in virtio0 virtio1; do echo $d > bind; done; true"
    )
    assert later() == [0]
    assert machine.look(0, 7) == b"chunk 0"
    assert backend.do(backend.unmap(0)) == [0]
