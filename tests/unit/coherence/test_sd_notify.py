"""Notifications to systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.sd_notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_each_state_is_sent_as_specified(manager: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})
    assert notifier.alive_every == 1.5
    notifier.ready("Table /vt")
    assert manager.recv(100) == b"READY=1\nSTATUS=Table /vt"
    notifier.reloading()
    first, second = manager.recv(100).split(b"\n")
    assert first == b"RELOADING=1"
    assert int(second.removeprefix(b"MONOTONIC_USEC=")) > 0
    notifier.alive()
    assert manager.recv(100) == b"WATCHDOG=1"
    notifier.stopping()
    assert manager.recv(100) == b"STOPPING=1"


def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0test-notify-{os.getpid()}")
        sock.settimeout(5)
        Notifier({"NOTIFY_SOCKET": f"@test-notify-{os.getpid()}"}).alive()
        assert sock.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "/" + "x" * 200])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready()
    notifier.stopping()
    assert notifier.alive_every is None


def test_a_watchdog_of_another_process_is_not_fed(manager: socket.socket, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    assert Notifier(environment).alive_every is None


def test_a_manager_that_is_gone_or_full_does_not_stop_the_service(manager: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    for _ in range(2000):
        notifier.alive()
    manager.close()
    notifier.alive()
