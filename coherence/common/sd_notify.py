"""Telling systemd how a service is doing: the sd_notify protocol (sd_notify(3), sd_watchdog_enabled(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends states to the service manager that started this process; does nothing without one.

    The socket is connected once, so that it serves a process that has shut itself into a sandbox, too.

    Args:
        environment: where NOTIFY_SOCKET and WATCHDOG_USEC are looked up, the process's own by default.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        self._watchdog_seconds: float | None = None
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            sock.close()
            return
        self._socket = sock
        microseconds = environment.get("WATCHDOG_USEC", "")
        if microseconds.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self._watchdog_seconds = int(microseconds) / 1e6

    @property
    def alive_every(self) -> float | None:
        """How often, in seconds, alive is to be called; None when nobody watches."""
        return self._watchdog_seconds / 2 if self._watchdog_seconds else None

    def ready(self, status: str = "") -> None:
        """The service is up, or has finished reloading; `status` is shown by systemctl status."""
        self._send("READY=1", f"STATUS={status}")

    def alive(self) -> None:
        """The service is not stuck."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """The service reads its settings again; ready ends this."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service has begun to end."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            # A manager that does not listen must not stop the service; the watchdog is its own remedy.
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(lines).encode())
