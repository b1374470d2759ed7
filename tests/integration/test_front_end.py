"""The front-end against a running vfs-backend: coming back, rebooting, guest memory that comes and goes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coherent_vfs.guest.guest import Guest
from coherent_vfs.guest.vhost_user import PROTOCOL_FEATURES, USER_ADDRESS, FrontEnd, RequestFailed
from coherent_vfs.server.vhost_user.messages import (
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringState,
    pack_memory_table,
    pack_single_region,
    pack_vring_state,
)

MEMORY = 1 << 20
MORE = MemoryRegion(guest_addr=0x1000_0000, size=MEMORY, user_addr=USER_ADDRESS + 0x1000_0000, mmap_offset=0)
WAIT = 20.0


@dataclass
class Running:
    """A vfs-backend on a listening socket of ours, so that it can be reached from the start."""

    process: subprocess.Popen[str]
    socket: Path
    share: Path

    def fds(self) -> list[str]:
        """What the backend has open, without the numbers."""
        found = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(str(entry.readlink()).partition("[")[0].rstrip("0123456789"))
            except FileNotFoundError:
                continue
        return sorted(found)

    def mappings(self) -> int:
        """How often the backend has guest memory mapped."""
        return Path(f"/proc/{self.process.pid}/maps").read_text().count("memfd:guest-memory")


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Running]:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"content")
    path = tmp_path / "backend.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "coherent_vfs.server.main", "--shared-dir", str(share), "--tag", "myshare"]
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno()), "--num-request-queues", "2"],
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        yield Running(process, path, share)
        assert process.poll() is None, "the backend ended"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
    finally:
        process.kill()
        process.communicate()


def test_attach(backend: Running) -> None:
    with FrontEnd(backend.socket, MEMORY) as front_end:
        assert (front_end.tag, front_end.num_request_queues) == ("myshare", 2)
        assert front_end.protocol_features == PROTOCOL_FEATURES
        for index in range(3):
            front_end.start_queue(index, 64, index * 0x2000, index * 0x2000 + 0x400, index * 0x2000 + 0x800)
        assert [front_end.stop_queue(index) for index in range(3)] == [0, 0, 0]


def test_guests_come_and_go_and_leave_nothing(backend: Running) -> None:
    with FrontEnd(backend.socket, MEMORY):
        idle = backend.fds()
    for _ in range(5):
        with Guest.connect(backend.socket, request_queues=2) as guest, guest.open("/file") as file:
            assert file.pread(100, 0) == b"content"
            assert len(backend.fds()) > len(idle)
    with FrontEnd(backend.socket, MEMORY):
        assert backend.fds() == idle
        assert backend.mappings() == 1


KILLED_GUEST = """
import signal, sys
from coherent_vfs.guest.guest import Guest
guest = Guest.connect(sys.argv[1])
file = guest.open("/file")
print("attached", flush=True)
signal.pause()
"""


def test_guest_that_is_killed_is_followed_by_another(backend: Running) -> None:
    with FrontEnd(backend.socket, MEMORY):
        idle = backend.fds()
    command = [sys.executable, "-c", KILLED_GUEST, str(backend.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        assert guest.stdout.readline() == "attached\n"
        assert len(backend.fds()) > len(idle)
        guest.kill()
    with Guest.connect(backend.socket) as another:
        assert another.stat("/file").st_size == 7
    with FrontEnd(backend.socket, MEMORY):
        assert backend.fds() == idle


def test_reconnect_and_reboot(backend: Running) -> None:
    with FrontEnd(backend.socket, MEMORY) as front_end:
        idle = backend.fds()
        for again in (front_end.reconnect, front_end.reset, front_end.reconnect):
            front_end.start_queue(1, 64, 0, 0x400, 0x800)
            assert len(backend.fds()) == len(idle) + 4, "two descriptors, and duplicates for the ring"
            again()
            assert backend.fds() == idle
            assert backend.mappings() == 1


@pytest.mark.parametrize("slots", [True, False])
def test_memory_comes_and_goes_under_a_running_queue(backend: Running, slots: bool) -> None:
    features = PROTOCOL_FEATURES if slots else PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    own = MemoryRegion(guest_addr=0, size=MEMORY, user_addr=USER_ADDRESS, mmap_offset=0)
    with FrontEnd(backend.socket, MEMORY, protocol_features=features) as front_end:
        front_end.start_queue(1, 64, 0, 0x400, 0x800)
        for _ in range(20):
            if slots:
                front_end.tell(Request.ADD_MEM_REG, pack_single_region(MORE), [front_end.memory_fd])
                assert backend.mappings() == 2
                front_end.tell(Request.REM_MEM_REG, pack_single_region(MORE), [front_end.memory_fd])
            else:
                table = pack_memory_table([own, MORE])
                front_end.tell(Request.SET_MEM_TABLE, table, [front_end.memory_fd] * 2)
                assert backend.mappings() == 2
                front_end.tell(Request.SET_MEM_TABLE, pack_memory_table([own]), [front_end.memory_fd])
            assert backend.mappings() == 1
        assert front_end.stop_queue(1) == 0


def test_refusals_do_not_end_the_connection(backend: Running) -> None:
    with FrontEnd(backend.socket, MEMORY) as front_end:
        idle = backend.fds()
        attempts: list[Callable[[], object]] = [
            lambda: front_end.tell(Request.REM_MEM_REG, pack_single_region(MORE)),
            lambda: front_end.tell(Request.SET_VRING_NUM, pack_vring_state(VringState(3, 64))),
            lambda: front_end.tell(Request.SET_LOG_FD, fds=[front_end.memory_fd]),
            lambda: front_end.start_queue(1, 64, 8, 0x400, 0x800),
            lambda: front_end.start_queue(1, 4096, 0, 0x10000, 0x20000),
        ]
        for attempt in attempts:
            with pytest.raises(RequestFailed, match="refused"):
                attempt()
        front_end.start_queue(1, 64, 0, 0x400, 0x800)
        assert front_end.stop_queue(1) == 0
        front_end.reset()
        assert backend.fds() == idle
