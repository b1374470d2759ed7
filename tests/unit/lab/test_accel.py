"""The probe for KVM never makes anybody wait, and $LAB_ACCEL decides where it is set."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import accel
from tests.lab.paths import LabError

HANGS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); print(flush=True); signal.pause()"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(accel, "LAB_DIR", tmp_path)
    monkeypatch.delenv("LAB_ACCEL", raising=False)
    accel.choose.cache_clear()
    yield
    accel.choose.cache_clear()
    for child in accel._stuck:
        child.wait(60)
    accel._stuck.clear()


def test_probe_that_hangs_is_left_after_the_time_limit() -> None:
    begin = time.monotonic()
    assert accel.probe([sys.executable, "-c", HANGS], timeout=0.3) is False
    assert time.monotonic() - begin < 60
    assert len(accel._stuck) == 1


QUITS = "import sys; sys.exit(0 if sys.stdin.readline() == 'quit\\n' else 1)"


@pytest.mark.parametrize(
    ("program", "works"),
    [(QUITS, True), ("raise SystemExit(1)", False), ("import os; os.abort()", False)],
    ids=["fine", "refused", "aborts"],
)
def test_probe_tells_by_the_exit_status(program: str, works: bool) -> None:
    assert accel.probe([sys.executable, "-c", program], timeout=60) is works


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU: python -m tests.lab.setup")
@pytest.mark.parametrize(
    ("options", "works"), [(["tcg", "-cpu", "max"], True), (["tcg", "-cpu", "none-such"], False)], ids=["fine", "not"]
)
def test_qemu_of_the_probe_ends_when_it_is_told(options: list[str], works: bool) -> None:
    """The probe's own command line, but without KVM."""
    rest = accel._PROBE[1 + len(accel._KVM) :]
    assert accel.probe(["qemu-system-x86_64", "-accel", *options, *rest], timeout=60) is works


@pytest.mark.parametrize(("works", "name"), [(True, "kvm"), (False, "tcg")])
def test_finding_is_kept_until_the_next_boot(monkeypatch: pytest.MonkeyPatch, works: bool, name: str) -> None:
    findings = iter([works])
    monkeypatch.setattr(accel, "probe", lambda: next(findings))
    assert accel.choose() == name
    accel.choose.cache_clear()
    assert accel.choose() == name


@pytest.mark.parametrize("name", ["kvm", "tcg"])
def test_environment_decides_without_a_probe(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(accel, "probe", lambda: pytest.fail("probed"))
    monkeypatch.setenv("LAB_ACCEL", name)
    assert accel.choose() == name
    assert name in " ".join(accel.qemu_options())


def test_unknown_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_ACCEL", "warp")
    with pytest.raises(LabError, match="LAB_ACCEL is 'warp': use auto, kvm or tcg"):
        accel.choose()
