"""A running vfs-backend: from start to end, front-ends that come and go, and kill -9."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coherent_vfs.guest.guest import Guest
from tests.integration.coherenced_process import SECONDS, Coherenced, Manager, eventually


@pytest.fixture
def share(tmp_path: Path) -> Path:
    directory = tmp_path / "share"
    directory.mkdir()
    (directory / "file").write_text("content")
    return directory


@contextmanager
def backend(
    share: Path, *options: str | Path, directory: Path, stdin: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A vfs-backend that is ready; ended with SIGTERM, if it has not ended yet."""
    manager = Manager(directory)
    process = subprocess.Popen(
        [sys.executable, "-m", "coherent_vfs.server.main", "--shared-dir", share, *map(str, options)],
        env=os.environ | {"NOTIFY_SOCKET": str(manager.path)},
        stdin=stdin,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        manager.wait_for("READY=1")
        yield process
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=SECONDS)
        assert complaints == ""
        assert process.returncode in (0, -signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
        manager.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ends_by_a_signal_and_leaves_nothing(share: Path, tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, directory=tmp_path) as process, Guest.connect(path) as guest:
        assert guest.open("file").read() == b"content"
        process.send_signal(number)
        assert process.wait(SECONDS) == 0
        assert not path.exists()
        assert not path.with_name("s.pid").exists()


def test_one_guest_after_the_other(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, directory=tmp_path):
        for _ in range(3):
            with Guest.connect(path) as guest:
                assert guest.stat("file").st_size == 7


def test_a_second_front_end_waits_for_the_first_to_go(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, directory=tmp_path):
        first = Guest.connect(path)
        with socket.socket(socket.AF_UNIX) as second:
            second.connect(str(path))
            second.sendall(b"\x01\0\0\0\x01\0\0\0\0\0\0\0")  # GET_FEATURES
            assert first.stat("file").st_size == 7
            first.close()
            second.settimeout(SECONDS)
            assert len(second.recv(100)) == 20


def test_a_broken_front_end_is_dropped(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, "--log-level", "off", directory=tmp_path):
        for garbage in (b"", b"\xff" * 12, b"\x01\0\0\0\x01\0\0\0\xff\xff\xff\xff", os.urandom(4096)):
            with socket.socket(socket.AF_UNIX) as broken:
                broken.connect(str(path))
                broken.sendall(garbage)
        with Guest.connect(path) as guest:
            assert guest.stat("file").st_size == 7


def test_killed_and_started_again_at_the_same_path(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, directory=tmp_path) as process, Guest.connect(path):
        process.kill()
        process.wait(SECONDS)
        assert path.exists()
        with backend(share, "--socket-path", path, directory=tmp_path), Guest.connect(path) as guest:
            assert guest.stat("file").st_size == 7


def test_inherited_socket(share: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with (
            backend(share, "--fd", "0", directory=tmp_path, stdin=listener.fileno()),
            Guest.connect(tmp_path / "s") as guest,
        ):
            assert guest.stat("file").st_size == 7


def test_an_inherited_socket_that_is_shut_down(share: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with backend(share, "--fd", "0", directory=tmp_path, stdin=listener.fileno()) as process:
            with Guest.connect(tmp_path / "s") as guest:
                listener.shutdown(socket.SHUT_RDWR)
                assert guest.stat("file").st_size == 7
            assert process.wait(SECONDS) == 0
            assert process.stderr is not None
            (line,) = process.stderr.read().splitlines()
            assert "no front-end can connect any more: the listening socket was shut down" in line


def test_exit_on_disconnect(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with backend(share, "--socket-path", path, "--exit-on-disconnect", directory=tmp_path) as process:
        with Guest.connect(path) as guest:
            assert guest.stat("file").st_size == 7
        assert process.wait(SECONDS) == 0


def test_rlimit_nofile(share: Path, tmp_path: Path) -> None:
    with backend(share, "--socket-path", tmp_path / "s", "--rlimit-nofile", "512", directory=tmp_path) as process:
        limits = Path(f"/proc/{process.pid}/limits").read_text()
    (line,) = (each for each in limits.splitlines() if each.startswith("Max open files"))
    assert line.split()[3] == "512"


def test_a_member_of_a_domain(share: Path, tmp_path: Path) -> None:
    with Coherenced(tmp_path) as coherenced:
        coherenced.start()
        options = (
            *("--socket-path", tmp_path / "s", "--cache", "shared", "--guest", "web"),
            *("--coherence", coherenced.paths.table, "--coherence-socket", coherenced.socket),
        )
        with (
            backend(share, *options, directory=tmp_path),
            Guest.connect(tmp_path / "s", table=coherenced.paths.table) as guest,
        ):
            assert guest.aware
            assert guest.stat("file").st_size == 7
            (member,) = coherenced.status().backends
            assert (member.guest, member.cache) == ("web", "shared")
            counters = coherenced.counters("web")
            assert counters["aware"] == 1
            assert counters["requests"] > 0
        eventually(lambda: not coherenced.status().backends)
