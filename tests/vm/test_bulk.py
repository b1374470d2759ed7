"""Much data and many files: what a guest writes is what the host has, and what the guest reads again."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from tests.lab import backends
from tests.lab.guest import Guest, boot

MIB = 1 << 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["uml", pytest.param("qemu", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(
    ("cache", "mebibytes"),
    [
        ("none", 128),
        pytest.param("none", 1024, marks=pytest.mark.slow),
        pytest.param("auto", 1024, marks=pytest.mark.slow),
    ],
)
def test_much_data_has_equal_checksums(kind: str, cache: str, mebibytes: int, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir, cache=cache) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        with (share / "source").open("wb") as file:
            for seed in range(mebibytes):
                file.write(random.Random(seed).randbytes(MIB))
        vm.check("dd if=/mnt/source of=/mnt/copy bs=1M conv=fsync", timeout=500)
        vm.check("echo 3 > /proc/sys/vm/drop_caches")
        in_guest = vm.check("dd if=/mnt/copy bs=1M 2>/dev/null | md5sum", timeout=500).split()[0].decode()
        assert in_guest == checksum(share / "copy") == checksum(share / "source")
        assert (share / "copy").stat().st_size == mebibytes * MIB


def checksum(path: Path) -> str:
    """MD5 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def make_tree(folder: Path, files: int) -> None:
    """Make a tree of small files, 100 in a folder, of different sizes and contents."""
    for number in range(files):
        if number % 100 == 0:
            place = folder / f"{number // 1000:02d}" / f"{number // 100 % 10}"
            place.mkdir(parents=True)
        (place / f"file-{number:05d}").write_text(f"{number}\n" * (number % 200))


def bring_in(vm: Guest, host_folder: Path) -> str:
    """Show a folder of the host in a User-Mode Linux guest, beside virtio-fs; return its place there."""
    vm.check(f"mkdir -p /run/source && mount -t hostfs -o ro,/host{host_folder} none /run/source")
    return "/run/source"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["uml"], indirect=True)
@pytest.mark.parametrize(
    ("files", "cache"),
    [
        (1_000, "auto"),
        pytest.param(4_000, "auto", marks=pytest.mark.slow),
        pytest.param(20_000, "none", marks=pytest.mark.slow),
        pytest.param(20_000, "auto", marks=pytest.mark.slow),
    ],
)
def test_tree_of_many_files(kind: str, files: int, cache: str, share: Path, run_dir: Path, tmp_path: Path) -> None:
    # A guest that may cache names keeps all their inodes: more than the backend may have open.
    limit = ["--rlimit-nofile", str(files // 2)]
    source = tmp_path / "source"
    make_tree(source, files)
    with (
        backends.ours(share, run_dir, cache=cache, options=limit) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        place = bring_in(vm, source)
        vm.check(f"cp -r {place} /mnt/tree && diff -r {place} /mnt/tree", timeout=500)
        assert int(vm.check("find /mnt/tree -type f | wc -l", timeout=60)) == files
        subprocess.run(["diff", "-r", source, share / "tree"], check=True)
        vm.check("rm -rf /mnt/tree", timeout=300)
        assert list(share.iterdir()) == []


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Lab", "-c", "user.email=lab@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["uml", pytest.param("qemu", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.slow), "auto"])
def test_git_clone_and_status(kind: str, cache: str, userland: str, share: Path, run_dir: Path) -> None:
    make_tree(share / "source", 300)
    git(share / "source", "init", "-q", "-b", "main")
    git(share / "source", "add", "-A")
    git(share / "source", "commit", "-q", "-m", "all")
    with (
        backends.ours(share, run_dir, cache=cache) as backend,
        boot(kind, shares={"share": backend.socket}, root=userland) as vm,
    ):
        vm.mount("share", "/mnt")
        in_guest = "cd /mnt; export HOME=/tmp; git"
        vm.check(f"{in_guest} clone -q file:///mnt/source work", timeout=200)
        status = f"{in_guest} -C work status --porcelain"
        assert vm.check(status, timeout=60) == b""
        vm.check(f"{in_guest} -C work fsck --strict", timeout=60)
        (share / "work/00/0/file-00001").write_text("changed on the host\n")
        # The time that cached attributes may be used has to pass in mode auto.
        vm.check("sleep 1.1")
        assert vm.check(status, timeout=60) == b" M 00/0/file-00001\n"
        git(share / "work", "checkout", "-q", "--", ".")
        git(share / "work", "fsck", "--strict")
