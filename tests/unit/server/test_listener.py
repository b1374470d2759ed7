"""The front-end's socket: who has it, what a killed backend left, and what goes with it."""

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.server.listener import adopt, listen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@contextmanager
def refused(part: str) -> Iterator[None]:
    with pytest.raises(UserError, match=re.escape(part)) as caught:
        yield
    assert "\n" not in str(caught.value)


def test_listens_and_leaves_nothing(path: Path) -> None:
    with listen(path, None) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.with_name("s.sock.pid").read_text() == f"{os.getpid()}\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            listener.socket.accept()[0].close()
    assert list(path.parent.iterdir()) == []


def test_a_second_one_is_refused_by_name_of_the_first(path: Path) -> None:
    with listen(path, None):
        with refused(f"socket {path} is taken by process {os.getpid()}"):
            listen(path, None)
        assert path.exists()


def test_what_a_killed_backend_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen(1)
    path.with_name("s.sock.pid").write_text("99999999\n")
    with listen(path, None) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.socket.accept()[0].close()
        assert path.with_name("s.sock.pid").read_text() == f"{os.getpid()}\n"


def test_another_programs_socket_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        other.setblocking(False)
        with refused(f"socket {path} is in use by another program"):
            listen(path, None)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert [each.name for each in path.parent.iterdir()] == ["s.sock"]


def test_a_file_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with refused(f"{path} exists and is no socket"):
        listen(path, None)
    assert path.read_text() == "precious"


def test_a_link_for_a_pid_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    path.with_name("s.sock.pid").symlink_to("precious")
    with refused(f"socket {path}"):
        listen(path, None)
    assert (tmp_path / "precious").read_text() == "precious"


def test_impossible_paths(tmp_path: Path) -> None:
    with refused("longer than 107 bytes"):
        listen(tmp_path / ("n" * 108), None)
    with refused(f"no directory {tmp_path / 'none'}"):
        listen(tmp_path / "none" / "s", None)
    (tmp_path / "file").touch()
    with refused("Not a directory"):
        listen(tmp_path / "file" / "s", None)


def test_group(path: Path) -> None:
    with refused("no group nonesuch"):
        listen(path, "nonesuch")
    assert list(path.parent.iterdir()) == []
    with listen(path, str(os.getgid())):
        st = path.stat()
        assert (stat.S_IMODE(st.st_mode), st.st_gid) == (0o660, os.getgid())


def test_inherited_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(str(path))
        with refused("is no listening Unix stream socket"):
            adopt(inherited.fileno())
        inherited.listen(1)
        with adopt(os.dup(inherited.fileno())) as listener, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            listener.socket.accept()[0].close()
    assert path.exists(), "it stays with whoever made it"


@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_inherited_socket_of_another_kind(kind: int) -> None:
    type_ = socket.SOCK_DGRAM if kind == socket.AF_UNIX else socket.SOCK_STREAM
    with socket.socket(kind, type_) as other, refused("is no listening Unix stream socket"):
        adopt(other.fileno())


def test_inherited_descriptor_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with (tmp_path / "f").open() as file, refused("Socket operation on non-socket"):
        adopt(file.fileno())
    with refused("Bad file descriptor"):
        adopt(1_000_000)
