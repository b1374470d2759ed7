"""The daemon's socket file."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from coherent_vfs.coherence.common import unix_socket
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.unix_socket import Acceptor, open_listener, permit


def test_mode_and_group_are_set(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s"
    with open_listener(path, 0o620, str(os.getgid())):
        assert stat.S_IMODE(path.stat().st_mode) == 0o620
        assert path.stat().st_gid == os.getgid()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    open_listener(path, 0o600, None).close()
    assert path.is_socket()
    with (
        open_listener(path, 0o600, None),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        client.connect(str(path))


def test_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_listener(path, 0o600, None), pytest.raises(UserError, match="in use by another process"):
        open_listener(path, 0o600, None)


def test_a_socket_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        with pytest.raises(UserError, match="use another --socket"):
            open_listener(path, 0o600, None)
    assert path.exists()


@pytest.mark.parametrize("path", ["/proc/nowhere/s", "/" + "x" * 300])
def test_an_impossible_path_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="choose another with --socket"):
        open_listener(Path(path), 0o600, None)


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no group no-such-group"):
        open_listener(tmp_path / "s", 0o600, "no-such-group")
    assert list(tmp_path.iterdir()) == [], "a socket file without its mode would stop the next daemon"


def test_an_acceptor_that_is_stopped_while_it_pauses_stays_stopped(
    tmp_path: Path, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("no client can be accepted")
    monkeypatch.setattr(unix_socket, "ACCEPT_AGAIN_SECONDS", 0.05)
    accepted: list[socket.socket] = []
    tries = 0

    class Short(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with Short(fileno=open_listener(tmp_path / "s", 0o600, None).detach()) as listener:
            acceptor = Acceptor(listener, loop, accepted.append, "client", "")
            acceptor.start()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(tmp_path / "s"))
                await asyncio.sleep(0.02)
                acceptor.stop()
                await asyncio.sleep(0.1)

    asyncio.run(run())
    assert (tries, accepted) == (1, [])


def test_a_missing_file_cannot_be_permitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot set mode 0600"):
        permit(tmp_path / "s", 0o600, None)
