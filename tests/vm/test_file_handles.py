"""File handles in a stock guest, as NFS servers, fanotify and CRIU use them, also of what its kernel has forgotten."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import assets
from tests.lab.guest import Guest
from tests.vm.alone import guest_in_mode

PROGRAM = Path(__file__).with_name("programs") / "handles"
FORGET = "sync; for i in 1 2 3 4; do echo 3 > /proc/sys/vm/drop_caches; done"
FORGOTTEN_SECONDS = 2.5
"""After which the backend has closed what the guest has forgotten."""


@pytest.fixture
def share() -> Iterator[Path]:
    """On a file system that has file handles."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/f").write_text("content")
    yield folder
    shutil.rmtree(folder)


def opened(vm: Guest, name: str) -> str:
    """What is found by a handle."""
    return vm.run(f"/handles open /mnt /{name}").output.decode().strip()


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
@pytest.mark.parametrize("cache", ["none", "auto", "shared"])
def test_what_a_handle_finds(kind: str, cache: str, share: Path, run_dir: Path) -> None:
    with guest_in_mode(kind, share, run_dir, cache) as vm:
        vm.put_file("/handles", assets.compile_static(PROGRAM).read_bytes())
        vm.check("/handles take /mnt/a/b/f /file && /handles take /mnt/a/b /directory && /handles take /mnt /top")
        for wait in (0.0, 0.0, FORGOTTEN_SECONDS):
            assert (opened(vm, "file"), opened(vm, "directory"), opened(vm, "top")) == ("content", "f", "a")
            vm.check(FORGET)
            time.sleep(wait)
        assert (opened(vm, "file"), opened(vm, "directory")) == ("content", "f")
        # The same file by its name, at the same time.
        assert vm.check("cat /mnt/a/b/f") == b"content"
        vm.check("cd /mnt/a/b && mv f g && mv /mnt/a/b /mnt/c && echo more >> /mnt/c/g")
        assert (opened(vm, "file"), opened(vm, "directory")) == ("contentmore", "g")
        vm.check(FORGET)
        time.sleep(FORGOTTEN_SECONDS)
        # What the host moves out of the share is in it no more; what it deletes is nowhere.
        outside = share.with_name(share.name + ".outside")
        (share / "c").rename(outside)
        try:
            assert opened(vm, "directory") == "ESTALE"
            assert opened(vm, "top") == "a"
            (outside / "g").unlink()
            assert opened(vm, "file") == "ESTALE"
        finally:
            shutil.rmtree(outside)
