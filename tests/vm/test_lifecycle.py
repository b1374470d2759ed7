"""Guests come, go, restart and die while backends serve."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab import assets, backends
from tests.lab.guest import boot


@pytest.mark.parametrize("kind", ["qemu", "uml"], indirect=True)
def test_reboot_and_remount(kind: str, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir) as backend,
        boot(kind, shares={"share": backend.socket}) as vm,
    ):
        vm.mount("share", "/mnt")
        descriptors = open_files(backend.pid)
        # Without unmounting, and with files open: the backend must drop what the guest cannot return.
        vm.check("mkdir /mnt/d; for i in $(seq 50); do echo $i > /mnt/d/$i; done; (sleep 1000 < /mnt/d/1 &)")
        assert open_files(backend.pid) > descriptors
        vm.reboot()
        vm.mount("share", "/mnt")
        assert vm.check("cat /mnt/d/50; ls /mnt/d | wc -l") == b"50\n50\n"
        vm.check("echo again > /mnt/after && umount /mnt")
        assert (share / "after").read_text() == "again\n"
        assert open_files(backend.pid) <= descriptors + 1
        assert backend.process.running
        assert backend.process.output() == ""


@pytest.mark.parametrize("kind", [pytest.param("qemu", marks=pytest.mark.slow), "uml"], indirect=True)
def test_killed_guest_leaves_the_backend_serving(kind: str, share: Path, run_dir: Path) -> None:
    with backends.ours(share, run_dir) as backend:
        with boot(kind, shares={"share": backend.socket}) as vm:
            vm.mount("share", "/mnt")
            vm.check("echo first > /mnt/first; (while :; do echo x > /mnt/busy; rm /mnt/busy; done) > /dev/null 2>&1 &")
            vm.kill()
        with boot(kind, shares={"share": backend.socket}) as vm:
            vm.mount("share", "/mnt")
            assert vm.check("cat /mnt/first; echo second > /mnt/second") == b"first\n"
        assert (share / "second").read_text() == "second\n"
        assert backend.process.running


@pytest.mark.parametrize("kind", ["qemu"], indirect=True)
def test_two_guests_on_two_backends(kind: str, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir, tag="one") as first,
        backends.ours(share, run_dir, tag="two") as second,
        boot(kind, shares={"one": first.socket}) as one,
        boot(kind, shares={"two": second.socket}) as two,
    ):
        one.mount("one", "/mnt")
        two.mount("two", "/mnt")
        one.check("echo from one > /mnt/one; mkdir /mnt/d")
        assert two.check("cat /mnt/one; ls -A /mnt") == b"from one\nd\none\n"
        two.check("mv /mnt/one /mnt/d/renamed; echo more >> /mnt/d/renamed")
        assert one.check("cat /mnt/d/renamed") == b"from one\nmore\n"
        assert one.run("cat /mnt/one").status != 0
        (share / "d/renamed").unlink()
        assert one.run("cat /mnt/d/renamed").status != 0
        assert two.check("ls -A /mnt/d") == b""
        # Both at once: none of the appended lines is lost.
        line = "for i in $(seq 200); do echo line >> /mnt/log; done"
        with ThreadPoolExecutor() as pool:
            for ended in [pool.submit(vm.check, line, timeout=60) for vm in (one, two)]:
                ended.result()
        assert (share / "log").read_text() == "line\n" * 400


@pytest.mark.parametrize("kind", [pytest.param("qemu", marks=pytest.mark.slow), "uml"], indirect=True)
def test_root_on_virtio_fs(kind: str, share: Path, run_dir: Path) -> None:
    assets.share_root(share)
    with (
        backends.ours(share, run_dir, cache="auto", tag="rootfs") as backend,
        boot(kind, shares={"rootfs": backend.socket}, root="virtiofs:rootfs") as vm,
    ):
        assert b"rootfs / virtiofs rw" in vm.check("cat /proc/mounts")
        vm.check("mkdir -p /srv/new; echo from the root > /srv/new/file; ls -la / > /srv/new/listing")
        assert (share / "srv/new/file").read_text() == "from the root\n"
        vm.reboot()
        assert vm.check("cat /srv/new/file") == b"from the root\n"


def open_files(pid: int) -> int:
    """Descriptors that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
