"""Wrong use of vfs-backend gets one line, which names the thing and the remedy, and a non-zero exit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.coherenced_process import SECONDS, Coherenced

COMMAND = [sys.executable, "-m", "coherent_vfs.server.main"]
# The interpreter may be where others cannot read: what is needed is loaded before the ids are given up.
AS_NOBODY = [
    sys.executable,
    "-c",
    "import os, sys, coherent_vfs.server.main\n"
    "coherent_vfs.server.main.parse(sys.argv[1:])\n"
    "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    "sys.exit(coherent_vfs.server.main.main(sys.argv[1:]))",
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


ANOTHER_CLOCK = ["unshare", "--time", "--monotonic", "1000", "--fork"]
needs_time_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self/ns/time").exists(),
    reason="needs root, and a kernel with time namespaces",
)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    directory = tmp_path / "share"
    directory.mkdir()
    return directory


@pytest.fixture
def coherenced(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        yield daemon


def complaint(*arguments: str | Path, status: int = 1, command: list[str] = COMMAND) -> str:
    """The one line that vfs-backend ends with, given these arguments."""
    ended = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("vfs-backend: ")
    return line


def assert_says(line: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in line


def test_bad_options(share: Path, tmp_path: Path) -> None:
    line = complaint("--shared-dir", share, "--socket-path", tmp_path / "s", "--cache", "bogus", status=2)
    assert_says(line, "--cache", "'bogus'", "shared", "--help")
    assert_says(complaint("--shared-dir", share, "--bogus", status=2), "--bogus", "--help")
    assert_says(complaint(status=2), "--shared-dir", "--help")


def test_no_such_directory(tmp_path: Path) -> None:
    line = complaint("--shared-dir", tmp_path / "none", "--socket-path", tmp_path / "s")
    assert_says(line, tmp_path / "none", "No such file or directory", "--shared-dir")
    assert not (tmp_path / "s").exists()


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = complaint("--shared-dir", tmp_path / "file", "--socket-path", tmp_path / "s")
    assert_says(line, tmp_path / "file", "Not a directory", "--shared-dir")


def test_socket_path_taken(share: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        line = complaint("--shared-dir", share, "--socket-path", path)
    assert_says(line, path, "another program", "--socket-path")
    path.unlink()

    path.write_text("precious")
    line = complaint("--shared-dir", share, "--socket-path", path)
    assert_says(line, path, "no socket", "--socket-path")
    assert path.read_text() == "precious"


def test_socket_directory_missing(share: Path, tmp_path: Path) -> None:
    line = complaint("--shared-dir", share, "--socket-path", tmp_path / "none" / "s")
    assert_says(line, tmp_path / "none", "create it", "--socket-path")


def test_socket_path_too_long(share: Path, tmp_path: Path) -> None:
    line = complaint("--shared-dir", share, "--socket-path", tmp_path / ("n" * 107))
    assert_says(line, "n" * 107, "107 bytes", "--socket-path")


def test_no_such_group(share: Path, tmp_path: Path) -> None:
    line = complaint("--shared-dir", share, "--socket-path", tmp_path / "s", "--socket-group", "nonesuch")
    assert_says(line, "nonesuch", "--socket-group")


def test_fd_that_does_not_listen(share: Path) -> None:
    assert_says(complaint("--shared-dir", share, "--fd", "99"), "--fd 99", "Unix socket")


def test_daemon_gone(share: Path, tmp_path: Path, coherenced: Coherenced) -> None:
    arguments: tuple[str | Path, ...] = (
        *("--shared-dir", share, "--socket-path", tmp_path / "s", "--cache", "shared"),
        *("--coherence", coherenced.paths.table, "--coherence-socket", coherenced.socket),
    )
    assert_says(complaint(*arguments), coherenced.socket, "no coherenced", "start it")
    coherenced.start()
    coherenced.kill()
    assert_says(complaint(*arguments), coherenced.socket, "no coherenced", "start it")
    assert not (tmp_path / "s").exists()


@needs_time_namespaces
def test_another_clock_than_that_of_coherenced(share: Path, tmp_path: Path, coherenced: Coherenced) -> None:
    coherenced.start()
    line = complaint(
        *("--shared-dir", share, "--socket-path", tmp_path / "s", "--cache", "shared"),
        *("--coherence", coherenced.paths.table, "--coherence-socket", coherenced.socket),
        command=[*ANOTHER_CLOCK, *COMMAND],
    )
    assert_says(line, "clock", "+1000 s", "one time namespace")
    coherenced.kill()
    with Coherenced(tmp_path, ANOTHER_CLOCK) as other:
        other.paths, other.socket = coherenced.paths, coherenced.socket
        assert other.spawn().wait(SECONDS) == 1
        (line,) = [line for line in other.log().splitlines() if line.startswith("coherenced: ")]
    assert_says(line, coherenced.paths.leases, "clock", "+1000 s", "one time namespace", "remove it")


def test_table_of_another_version(share: Path, tmp_path: Path, coherenced: Coherenced) -> None:
    coherenced.start()
    with coherenced.paths.table.open("r+b") as table:
        table.seek(8)
        table.write((99).to_bytes(8, "little"))
    line = complaint(
        *("--shared-dir", share, "--socket-path", tmp_path / "s", "--cache", "shared"),
        *("--coherence", coherenced.paths.table, "--coherence-socket", coherenced.socket),
    )
    assert_says(line, coherenced.paths.table, "99", "version")


def test_table_of_another_daemon(share: Path, tmp_path: Path, coherenced: Coherenced) -> None:
    coherenced.start()
    (tmp_path / "other").touch()
    line = complaint(
        *("--shared-dir", share, "--socket-path", tmp_path / "s", "--cache", "shared"),
        *("--coherence", tmp_path / "other", "--coherence-socket", coherenced.socket),
    )
    assert_says(line, tmp_path / "other", coherenced.socket, "another table")


@needs_root
def test_not_permitted() -> None:
    # Not in tmp_path: pytest's directories are root's alone.
    with tempfile.TemporaryDirectory() as name, Coherenced(Path(name)) as coherenced:
        directory = Path(name)
        directory.chmod(0o755)
        share, theirs = directory / "share", directory / "theirs"
        share.mkdir(0o700)
        theirs.mkdir()
        theirs.chmod(0o777)

        def refused(*arguments: str | Path, socket_path: Path = theirs / "s") -> str:
            where = ("--shared-dir", share, "--socket-path", socket_path)
            return complaint(*where, *arguments, command=AS_NOBODY)

        assert_says(refused(), share, "Permission denied", "--shared-dir")
        share.chmod(0o755)
        assert_says(refused(socket_path=directory / "s"), directory / "s", "Permission denied", "--socket-path")
        assert_says(refused("--rlimit-nofile", str(1 << 29)), "--rlimit-nofile", "not permitted")

        coherenced.start()
        domain = ("--coherence", coherenced.paths.table, "--coherence-socket", coherenced.socket)
        assert_says(refused("--cache", "shared", *domain), coherenced.socket, "not permitted")
        assert list(theirs.iterdir()) == []
