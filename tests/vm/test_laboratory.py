"""What the tests rely on: commands in a guest, and clear accounts of guests that fail."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.lab import backends
from tests.lab.guest import GuestError, boot


@pytest.mark.parametrize("kind", ["qemu", "uml"], indirect=True)
def test_commands(kind: str) -> None:
    data = bytes(range(256)) * 500
    with boot(kind, memory=128) as vm:
        result = vm.run("echo out; echo err >&2; exit 7")
        assert (result.status, result.output) == (7, b"out\nerr\n")
        assert vm.run("kill -9 $$").status == -9
        assert vm.check("cat", stdin=data) == data
        vm.put_file("/tmp/data", data)
        assert vm.check("cat /tmp/data") == data
        with pytest.raises(GuestError, match=r"(?s)'echo why; false' ended with status 1 and wrote:\nwhy"):
            vm.check("echo why; false")
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"(?s)took more than 0\.5 s; it wrote b'begun"):
            vm.run("echo begun; sleep 1000", timeout=0.5)
        assert time.monotonic() - begin < 60
        assert vm.check("sleep 1000 & echo not waited for", timeout=60) == b"not waited for\n"
        vm.reboot()
        assert vm.run("ls /tmp/data").status != 0
        pid = vm.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("kind", ["qemu"], indirect=True)
def test_panic_is_told_with_the_console(kind: str) -> None:
    with (
        boot(kind, memory=128) as vm,
        pytest.raises(GuestError, match=r"(?s)kernel panicked.*sysrq: Trigger a crash"),
    ):
        vm.run("echo c > /proc/sysrq-trigger")


@pytest.mark.parametrize("kind", ["qemu"], indirect=True)
def test_boot_that_fails_is_told_with_the_console(kind: str, share: Path, run_dir: Path) -> None:
    with (
        backends.ours(share, run_dir, tag="empty") as backend,
        pytest.raises(GuestError, match=r"(?s)kernel panicked.*/lab/init failed"),
    ):
        boot(kind, shares={"empty": backend.socket}, root="virtiofs:empty")


@pytest.mark.parametrize("kind", ["qemu"], indirect=True)
def test_share_without_a_backend_is_told(kind: str, run_dir: Path) -> None:
    with pytest.raises(GuestError, match=r"(?s)the guest has ended.*no\.sock.*No such file"):
        boot(kind, shares={"none": run_dir / "no.sock"})
