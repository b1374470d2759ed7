"""How the things of a domain are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.config import load
from coherent_vfs.coherence.shm import paths
from coherent_vfs.coherence.shm.paths import DomainPaths, existing_socket_of, socket_of, table_path

SPELLINGS = ["vt", "/vt", "/dev/shm/vt"]
TABLE = Path("/dev/shm/vt")


@pytest.mark.parametrize("text", SPELLINGS)
def test_each_spelling_is_the_same_domain(text: str) -> None:
    assert DomainPaths(text) == DomainPaths("vt")
    assert DomainPaths(text).name == load(None, {"table": text}).table == "vt"
    assert DomainPaths(text).table == table_path(text) == TABLE
    assert DomainPaths(text).leases == Path("/dev/shm/vt.leases")
    assert socket_of(text) == socket_of("vt")


@pytest.mark.parametrize("text", ["./vt", "a/vt", "/tmp/vt", "/dev/shm/a/vt", "//vt"])
def test_anything_else_is_the_path_of_a_file_and_no_domain(text: str) -> None:
    assert table_path(text) == Path(text)
    with pytest.raises(UserError, match="use one such as vt, without slashes"):
        DomainPaths(text)


@pytest.mark.parametrize("text", ["", "/", "..", "/..", ".vt", "v t", "vt\n", "n" * 201])
def test_what_cannot_be_a_table(text: str) -> None:
    with pytest.raises(UserError, match="table name"):
        DomainPaths(text)


@pytest.mark.parametrize(
    ("uid", "own", "socket"),
    [
        (0, "/run/user/0", "/run/coherenced/vt.sock"),
        (1000, "/run/user/1000", "/run/user/1000/coherenced/vt.sock"),
        (1000, None, "/run/coherenced/vt.sock"),
        (1000, "", "/run/coherenced/vt.sock"),
        (1000, "run", "/run/coherenced/vt.sock"),
    ],
)
def test_the_socket_of_a_user(monkeypatch: pytest.MonkeyPatch, uid: int, own: str | None, socket: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    if own is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", own)
    assert socket_of("vt") == load(None, {}).socket_path == Path(socket)


def test_a_client_finds_its_users_socket_and_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, system = tmp_path / "user/coherenced/vt.sock", tmp_path / "coherenced/vt.sock"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(paths, "RUN", tmp_path / "coherenced")
    for path in own, system:
        path.parent.mkdir(parents=True)
    assert existing_socket_of("vt") == own
    system.touch()
    assert existing_socket_of("vt") == system
    own.touch()
    assert existing_socket_of("vt") == own
