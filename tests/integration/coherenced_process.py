"""A coherenced and its backends as processes of their own, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from coherent_vfs.coherence.ctl.client import Report, fetch_status
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table

SECONDS = 60.0
SLOTS = 1 << 18
"""So many that no two of the few that a test uses are the same by chance."""


def eventually(what: Callable[[], bool]) -> None:
    """Wait until something that another process brings about is so; fail after SECONDS."""
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """An O_PATH descriptor of a directory, as a backend has of its share."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


class Manager:
    """The part of a service manager: a socket that gets a service's notifications."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / f"notify-{secrets.token_hex(4)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(SECONDS)

    def wait_for(self, line: str) -> str:
        """The next notification with this line in it; the ones before are skipped."""
        while True:
            text = self._socket.recv(4096).decode()
            if line in text.split("\n"):
                return text

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


class Coherenced:
    """One table's daemon, which can be killed and started again. A context that leaves nothing behind.

    Args:
        directory: for socket and logs.
        prefix: what comes before its command.
    """

    def __init__(self, directory: Path, prefix: Sequence[str] = ()) -> None:
        self._prefix = prefix
        self.paths = DomainPaths(f"/test.{os.getpid()}.{secrets.token_hex(4)}")
        self.directory = directory
        self.socket = directory / f"{self.paths.name}.sock"
        self.manager = Manager(directory)
        self.process: subprocess.Popen[str] | None = None
        self._log_path = directory / "coherenced.log"
        self._log = self._log_path.open("a")

    def __enter__(self) -> Coherenced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if error is not None:
            print(self.log())
        self.manager.close()
        self._log.close()
        for key in self.paths.journal_keys():
            liveness.remove(key)
            self.paths.journal(key).unlink()
        self.paths.table.unlink(missing_ok=True)
        self.paths.leases.unlink(missing_ok=True)
        self.paths.lock.unlink(missing_ok=True)

    def spawn(self, *flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a daemon without waiting for it; the caller ends it."""
        command = [*self._prefix, sys.executable, "-m", "coherent_vfs.coherence.daemon.main"]
        command += ["--table", self.paths.name, "--slots", str(SLOTS)]
        command += ["--socket", str(self.socket), "--log-level", "info", *flags]
        return subprocess.Popen(
            command,
            env=os.environ | {"NOTIFY_SOCKET": str(self.manager.path)} | (environment or {}),
            stderr=self._log,
            text=True,
        )

    def start(self, *flags: str, environment: dict[str, str] | None = None) -> None:
        """Start the daemon and wait until it is ready."""
        self.process = self.spawn(*flags, environment=environment)
        self.manager.wait_for("READY=1")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal that ends the daemon; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """kill -9."""
        self.stop(signal.SIGKILL)

    def log(self) -> str:
        """Everything that the daemons of this object have logged."""
        return self._log_path.read_text()

    def mounts(self) -> int:
        """How often it has given up everything as anybody on this machine has mounted or unmounted something."""
        return self.log().count("was mounted or unmounted")

    def status(self) -> Report:
        """As coherencectl sees it."""
        return fetch_status(self.socket)

    def counters(self, guest: str) -> dict[str, int]:
        """What the backend of a guest has counted; waits until it has answered as soon as the daemon wants it to."""
        found: list[dict[str, int]] = []

        def answered() -> bool:
            backends = [backend for backend in self.status().backends if backend.guest == guest]
            found[:] = [backend.counters for backend in backends if backend.counters is not None]
            return bool(found)

        eventually(answered)
        return found[0]

    @contextlib.contextmanager
    def table(self) -> Iterator[Table]:
        """The table, read-only, as a guest has it."""
        table = Table.open(self.paths.table)
        try:
            yield table
        finally:
            table.close()


class Member:
    """A backend in a process of its own (coherenced_member.py). A context that ends it.

    Args:
        daemon: which it joins.
        guest: its guest's name.
        share: the directory that it shares, by default the daemon's.
    """

    def __init__(self, daemon: Coherenced, guest: str, share: Path | None = None) -> None:
        self._log_path = daemon.directory / f"member-{guest}.log"
        self._log = self._log_path.open("a")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.integration.coherenced_member",
                str(daemon.paths.table),
                str(daemon.socket),
                guest,
                str(share or daemon.directory),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.pid = self._process.pid
        self._read("joined")

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            stream.close()

    def log(self) -> str:
        """Its warnings and errors."""
        return self._log_path.read_text()

    def _read(self, expected: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line == expected, line

    def do(self, command: str) -> None:
        """Have it do one thing, and wait until it is done."""
        assert self.ask(command), command

    def ask(self, command: str) -> bool:
        """The same; whether it could be done."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline().strip()
        assert line in (f"done {command}", "refused"), line
        return line != "refused"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()
