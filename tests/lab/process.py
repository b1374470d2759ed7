"""Programs of the laboratory: each one ends with its test, also when the test is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab.paths import LabError

LEASH = Path(__file__).with_name("leash.py")
KILL_TIMEOUT = 60.0
"""Seconds that a killed program has to end; one that hangs in the kernel does not, and is left to its leash."""


class Process:
    """A program on a leash; its output goes to a file.

    Args:
        command: The program and its arguments.
        log: File that receives standard output and error.
        pass_fds: Descriptors that the program inherits under the same numbers.
        env: Additions to the environment.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command = [os.fspath(word) for word in command]
        self.log = log
        self._holder, leash = socket.socketpair()
        with leash, self.log.open("ab") as output:
            self._leash = subprocess.Popen(
                [sys.executable, "-I", "-S", os.fspath(LEASH), str(leash.fileno()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[leash.fileno(), *pass_fds],
                env={**os.environ, **(env or {})},
            )
        self._messages = self._holder.makefile("rb")
        first = self._messages.readline()
        if not first:
            self.kill()
            raise LabError(f"{self.command[0]} could not be started: {self.output()}")
        self.pid = int(first)
        """Process id of the program itself (setpriv replaces itself by it)."""

    def output(self) -> str:
        """What the program wrote so far."""
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._leash.poll() is None

    def wait(self, timeout: float) -> int:
        """Wait at most timeout seconds for the end; return the exit status (negative: a signal)."""
        try:
            self._leash.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.command[0]} still runs after {timeout} s") from None
        return int(self._messages.readline() or -signal.SIGKILL)

    def terminate(self, timeout: float = 5) -> None:
        """Ask the program to end, and kill it when it has not after timeout seconds."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(LabError):
                self.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Kill the program and all that it started; harmless when it has ended."""
        # Not close(): the file object made from the socket would keep it open.
        with contextlib.suppress(OSError):
            self._holder.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._leash.wait(KILL_TIMEOUT)
        self._messages.close()
        self._holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
