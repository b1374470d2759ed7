"""KVM is used only where a guest comes up with it, nobody waits long to know, and $LAB_ACCEL decides where it is set.

A program in place of QEMU plays the hosts on which KVM is there and does not do: this host's own is never used.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import accel, assets, guest
from tests.lab.guest import GuestError, boot
from tests.lab.paths import LabError

LIMIT = 1.0
"""Seconds that a guest has in these tests."""
LONG = 60.0
"""Seconds after which a test would have waited for what it must not wait for."""

HOST = f"""#!{sys.executable}
import os, re, signal, socket, struct, sys, time
words = " ".join(sys.argv)
agent = re.search("socket,id=agent,fd=([0-9]+)", words)
kind = "kvm" if "kvm" in words else "tcg"
stage = "guest" if agent else "probe"
with open(os.environ["HOST_LOG"], "a") as log:
    print(kind, stage, file=log)
fate = "boots" if kind == "tcg" else os.environ["HOST_" + stage.upper()]
if fate == "refuses":
    sys.exit("Could not access KVM kernel module")
if fate == "hangs":
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
if fate == "fails":
    print("KVM internal error. Suberror: 1", file=sys.stderr, flush=True)
if fate == "stops":
    print("early console in extract_kernel", flush=True)
if fate == "boots":
    if agent:
        socket.socket(fileno=int(agent[1])).send(struct.pack("<III", 0x42414C56, 1, 0))
    print("booting", flush=True)
    print("lab: user space", flush=True)
time.sleep(1000)
"""

Host = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(accel, "LAB_DIR", tmp_path)
    monkeypatch.delenv("LAB_ACCEL", raising=False)
    yield
    for child in accel._stuck:
        child.wait(60)
    accel._stuck.clear()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    """Set what becomes of the probe and of a guest with KVM; call it again for what was started."""
    program, log, some = tmp_path / "bin/qemu-system-x86_64", tmp_path / "log", tmp_path / "some"
    program.parent.mkdir()
    program.write_text(HOST)
    program.chmod(0o755)
    for file in (log, some):
        file.touch()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOST_LOG", str(log))
    monkeypatch.setattr(accel, "_DEVICE", some)
    monkeypatch.setattr(accel, "PROBE_TIMEOUT", LIMIT)
    monkeypatch.setattr(guest, "KVM_BOOT_TIMEOUT", LIMIT)
    monkeypatch.setattr(assets, "cloud_kernel", lambda: assets.Kernel(some, some, tmp_path))
    monkeypatch.setattr(assets, "busybox", lambda: some)
    monkeypatch.setattr(assets, "initramfs", lambda *_: b"")

    def play(*, probe: str = "", guest: str = "") -> list[str]:
        if probe:
            monkeypatch.setenv("HOST_PROBE", probe)
            monkeypatch.setenv("HOST_GUEST", guest or probe)
        return log.read_text().splitlines()

    return play


BROKEN = ["hangs", "fails", "silent", "stops", "refuses"]


@pytest.mark.parametrize(("fate", "name"), [*((fate, "tcg") for fate in BROKEN), ("boots", "kvm")])
def test_kvm_is_chosen_where_a_guest_comes_up(
    host: Host, fate: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host(probe=fate)
    begin = time.monotonic()
    assert accel.choose() == name
    assert time.monotonic() - begin < LONG
    assert capsys.readouterr().err.count("\n") == (name == "tcg")
    # The finding is kept: no second probe, by whatever process.
    assert accel.choose() == name
    assert host() == ["kvm probe"]


def test_without_kvm_nothing_is_tried(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accel, "_DEVICE", tmp_path / "missing")
    assert accel.choose() == "tcg"
    assert host() == []


@pytest.mark.parametrize("fate", BROKEN)
def test_a_guest_that_does_not_come_up_later_comes_up_without_kvm(
    host: Host, fate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host(probe="boots", guest=fate)
    begin = time.monotonic()
    with boot("qemu"):
        assert time.monotonic() - begin < LONG
    said = capsys.readouterr().err
    assert "did not come up with KVM" in said
    assert said.count("\n") == 1
    assert accel.choose() == "tcg"
    with boot("qemu"):
        pass
    assert host() == ["kvm probe", "kvm guest", "tcg guest", "tcg guest"]


def test_a_guest_that_comes_up_has_kvm(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host(probe="boots")
    for _ in range(2):
        with boot("qemu"):
            pass
    assert host() == ["kvm probe", "kvm guest", "kvm guest"]
    assert capsys.readouterr().err == ""


def test_a_guest_that_never_comes_up_does_not_speak_against_kvm(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host(probe="boots", guest="silent")
    with pytest.raises(GuestError, match="not ready"):
        boot("qemu", timeout=0.0)
    assert accel.choose() == "kvm"


@pytest.mark.parametrize("name", ["kvm", "tcg"])
def test_environment_decides_without_a_probe(host: Host, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    host(probe="hangs")
    monkeypatch.setenv("LAB_ACCEL", name)
    assert accel.choose() == name
    assert name in " ".join(accel.qemu_options(name))
    assert host() == []


def test_where_the_environment_wants_kvm_a_guest_fails_with_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host(probe="fails")
    monkeypatch.setenv("LAB_ACCEL", "kvm")
    with pytest.raises(GuestError, match="QEMU cannot run the guest by KVM"):
        boot("qemu")
    assert host() == ["kvm guest"]


def test_unknown_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_ACCEL", "warp")
    with pytest.raises(LabError, match="LAB_ACCEL is 'warp': use auto, kvm or tcg"):
        accel.choose()


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU: python -m tests.lab.setup")
@pytest.mark.parametrize(
    ("options", "works"),
    [(accel.qemu_options("tcg"), True), (["-accel", "tcg", "-cpu", "none-such"], False)],
    ids=["fine", "not"],
)
def test_the_probe_boots_a_real_guest(options: list[str], works: bool) -> None:
    """The probe itself, but without KVM."""
    assert accel.boots(options, LONG) is works
