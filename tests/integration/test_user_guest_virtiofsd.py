"""The user-space guest on Rust virtiofsd: it speaks the protocol that others speak, not only ours."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.guest.guest import Guest
from tests.lab import assets, backends

pytestmark = pytest.mark.skipif(
    not (assets.UML_TREE / "usr/libexec/virtiofsd").exists(),
    reason="no Rust virtiofsd: python -m tests.lab.setup --all",
)


@pytest.fixture
def share() -> Iterator[Path]:
    """A directory on a file system with extended attributes."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=["never", "auto", "always"])
def guest(request: pytest.FixtureRequest, share: Path, tmp_path: Path) -> Iterator[Guest]:
    """A guest on a virtiofsd in each of its modes."""
    options = ("--sandbox", "none", "--xattr", "--log-level", "error")
    with (
        backends.rust(share, tmp_path, cache=request.param, options=options) as backend,
        Guest.connect(backend.socket) as connected,
    ):
        yield connected


def test_names_attributes_and_data(guest: Guest, share: Path) -> None:
    data = os.urandom(2_500_000)
    guest.mkdir("/d")
    with guest.open("/d/f", os.O_RDWR | os.O_CREAT) as file:
        file.write(data)
        assert file.pread(len(data), 0) == data
        file.truncate(1_000_000)
        file.fallocate(0, 0, 1_000_001)
        assert file.stat().st_size == 1_000_001
        file.fsync()
    assert (share / "d/f").read_bytes() == data[:1_000_000] + b"\0"
    guest.symlink("d/f", "/l")
    guest.link("/d/f", "/also")
    assert guest.stat("/l").st_nlink == guest.stat("/also").st_nlink == 2
    guest.rename("/also", "/d/g")
    assert {entry.name: entry.stat().st_size for entry in guest.scandir("/d")} == {"f": 1_000_001, "g": 1_000_001}
    assert sorted(guest.listdir("/")) == ["d", "l"]
    guest.setxattr("/d/f", "user.a", b"1")
    assert guest.getxattr("/d/g", "user.a") == b"1"
    guest.chmod("/d/f", 0o600)
    guest.utime("/d/f", ns=(1, 2))
    assert (guest.stat("/d/g").st_mode & 0o777, guest.stat("/d/g").st_mtime_ns) == (0o600, 2)
    guest.unlink("/d/f")
    guest.unlink("/d/g")
    guest.rmdir("/d")
    with pytest.raises(FileNotFoundError, match="/l"):
        guest.stat("/l")
    guest.drop_caches()
