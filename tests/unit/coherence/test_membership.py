"""A backend's side of the protocol, with a daemon that does it wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.client import membership
from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.protocol.connection import Connection
from coherent_vfs.coherence.protocol.messages import (
    CLIENT_DECODER,
    PROTOCOL,
    FromClient,
    Granted,
    Message,
    Refused,
    Registered,
    Welcome,
)
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table
from tests.integration.coherenced_process import open_directory
from tests.unit.server.fake_device import leaked, open_fds

Script = Callable[[Connection[FromClient]], None]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield sock


def join(listener: socket.socket, table_path: Path, answers: list[Message | bytes], fds: list[int]) -> str:
    """Join a daemon that answers so, the last time with descriptors; returns what the user is told."""

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            connection = Connection(sock, CLIENT_DECODER)
            for number, answer in enumerate(answers):
                connection.receive()
                if isinstance(answer, bytes):
                    sock.send(answer)
                else:
                    connection.send(answer, fds if number == len(answers) - 1 else [])
            connection.receive()

    before = open_fds()
    thread = threading.Thread(target=lambda: _quietly(serve))
    thread.start()
    with open_directory(Path("/")) as root, pytest.raises(UserError) as caught:
        Membership.join(str(table_path), share_root=root, guest="g", cache="none", socket_path=listener.getsockname())
    thread.join()
    assert not leaked(before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _quietly(serve: Callable[[], None]) -> None:
    try:
        serve()
    except Exception as error:
        # The client is expected to hang up; what it was told is what the test looks at.
        assert "closed by the peer" in str(error)


WELCOME = Welcome(PROTOCOL, bytes(16))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Welcome(PROTOCOL + 1, bytes(16))], "install one version of both"),
        ([Refused("no such luck: try again")], "no such luck: try again"),
        ([b"\xc1"], "malformed"),
        ([Registered()], "unexpected message: Registered"),
        ([WELCOME, WELCOME, Refused("enough")], "enough"),
        ([WELCOME, Granted(1)], "unexpected message: Granted"),
    ],
)
def test_a_daemon_that_answers_otherwise(
    listener: socket.socket, tmp_path: Path, answers: list[Message | bytes], says: str
) -> None:
    assert says in join(listener, tmp_path, answers, [])


def test_a_table_of_another_version(listener: socket.socket, table: Table, paths: DomainPaths) -> None:
    with paths.table.open("r+b") as file:
        file.seek(8)
        file.write(b"\x07")
        file.flush()
        says = join(listener, paths.table, [WELCOME, Granted(1)], [file.fileno()] * 3)
    assert "ABI 7" in says


def test_a_semaphore_that_is_not_there(
    listener: socket.socket, table: Table, leases: Leases, paths: DomainPaths
) -> None:
    with paths.table.open("r+b") as file, paths.leases.open("r+b") as lease_file:
        says = join(listener, paths.table, [WELCOME, Granted(1)], [file.fileno(), lease_file.fileno(), file.fileno()])
    assert "IPC namespace" in says


def test_a_daemon_that_does_not_answer(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "JOIN_SECONDS", 0.05)
    with open_directory(tmp_path) as root, pytest.raises(UserError, match="does not answer"):
        Membership.join(str(tmp_path), share_root=root, guest="g", cache="none", socket_path=listener.getsockname())


def test_a_working_directory_is_kept(listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    join(listener, tmp_path, [Refused("no")], [])
    assert Path.cwd() == tmp_path
