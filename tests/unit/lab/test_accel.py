"""The probe for KVM never makes anybody wait, and $LAB_ACCEL decides where it is set."""

from __future__ import annotations

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
        child.wait(5)
    accel._stuck.clear()


def test_probe_that_hangs_is_left_after_the_time_limit() -> None:
    begin = time.monotonic()
    assert accel.probe([sys.executable, "-c", HANGS], timeout=0.3) is False
    assert time.monotonic() - begin < 2
    assert len(accel._stuck) == 1


@pytest.mark.parametrize(("status", "works"), [(0, True), (1, False)])
def test_probe_tells_by_the_exit_status(status: int, works: bool) -> None:
    assert accel.probe([sys.executable, "-c", f"raise SystemExit({status})"]) is works


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
