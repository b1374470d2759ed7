"""vfs-backend processes and user-space guests on them, for tests of whole guests."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from coherent_vfs.guest.guest import Guest
from coherent_vfs.server.fuse.protocol import Opcode
from tests.integration.coherenced_process import SECONDS, Coherenced, eventually
from tests.lab.backends import listens


def requests_of(guest: Guest, look: Callable[[], object]) -> Counter[Opcode]:
    """What requests a look at something takes."""
    before = guest.requests.copy()
    look()
    return guest.requests - before


def warm_up(guest: Guest, look: Callable[[], object]) -> None:
    """Look until the guest needs no request for it any more.

    Nothing from a directory may be kept until coherenced has said that it watches it on the host; replies wait for that
    for a moment only.
    """
    eventually(lambda: not requests_of(guest, look))


class Backend:
    """A vfs-backend, which can be killed and started again. A context that ends it.

    Args:
        share: the directory to serve.
        directory: for socket and log.
        name: tells this backend from the others of a test.
        cache: the cache mode.
        daemon: for shared: the coherenced to join, which must run when the backend starts.
        options: more options.
        prefix: what comes before its command.
    """

    def __init__(
        self,
        share: Path,
        directory: Path,
        *,
        name: str = "a",
        cache: str = "none",
        daemon: Coherenced | None = None,
        options: tuple[str, ...] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        self.share = share
        self.socket = directory / f"{name}.sock"
        self._log_path = directory / f"{name}.log"
        self._daemon = daemon
        self._command = [
            *prefix,
            *(
                sys.executable,
                "-m",
                "coherent_vfs.server.main",
                "--shared-dir",
                str(share),
                "--socket-path",
                str(self.socket),
            ),
            *("--cache", cache, "--tag", name, "--xattr", *options),
        ]
        if daemon is not None:
            table, socket = str(daemon.paths.table), str(daemon.socket)
            self._command += ["--coherence", table, "--coherence-socket", socket]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if error is not None:
            print(self.log())

    def start(self) -> None:
        """Start the process and wait until it listens."""
        with self._log_path.open("ab") as log:
            process = self.process = subprocess.Popen(self._command, stderr=log)
        eventually(lambda: listens(self.socket) or process.poll() is not None)
        assert process.poll() is None, (process.returncode, self.log())

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        """What it wrote, all its lives long."""
        return self._log_path.read_text()

    def connect(self, *, aware: bool = True, timeout: float = SECONDS, request_queues: int = 1) -> Guest:
        """A guest on it; `aware`: with the daemon's table, if there is a daemon."""
        table = self._daemon.paths.table if aware and self._daemon is not None else None
        return Guest.connect(self.socket, table=table, timeout=timeout, request_queues=request_queues)
