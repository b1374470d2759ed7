"""Start backends: ours, and the Rust and C virtiofsd to compare with. Each ends with its with statement."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from coherent_vfs.coherence.shm.paths import DomainPaths
from tests.lab import assets
from tests.lab.paths import LabError
from tests.lab.process import Process

READY_TIMEOUT = 60.0
"""Seconds until a backend must listen."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend that listens on a socket.

    Attributes:
        pid: Process id of the process that was started (virtiofsd serves from a child of it).
    """

    process: Process
    socket: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """Processor time that the backend, its threads and its children have used so far."""
        return sum(_task_seconds(pid) for pid in [self.pid, *_descendants(self.pid)])


@contextlib.contextmanager
def ours(
    shared_dir: Path,
    folder: Path,
    *,
    cache: str = "none",
    tag: str = "share",
    options: Sequence[str] = (),
    cpu_list: str = "",
) -> Iterator[Backend]:
    """Serve a directory with vfs-backend.

    Args:
        shared_dir: The share.
        folder: For the socket and the log (TAG.sock, TAG.log).
        cache: none, auto, always or shared.
        tag: The share's tag, as User-Mode Linux asks for it.
        options: More options, as "--coherence", "/dev/shm/vt".
        cpu_list: Processors to run on; empty: any.
    """
    socket = folder / f"{tag}.sock"
    command = [
        console_script("vfs-backend"), "--shared-dir", str(shared_dir), "--socket-path", str(socket),
        "--cache", cache, "--tag", tag, *options,
    ]  # fmt: skip
    with _serve(command, socket, cpu_list) as backend:
        yield backend


@contextlib.contextmanager
def rust(
    shared_dir: Path,
    folder: Path,
    *,
    cache: str = "never",
    tag: str = "share",
    options: Sequence[str] = (),
    cpu_list: str = "",
) -> Iterator[Backend]:
    """Serve a directory with the Rust virtiofsd; arguments as those of ours, but cache is never."""
    socket = folder / f"{tag}.sock"
    command = [
        *assets.loader(assets.UML_TREE), str(assets.UML_TREE / "usr/libexec/virtiofsd"),
        "--shared-dir", str(shared_dir), "--socket-path", str(socket), "--cache", cache, "--tag", tag, *options,
    ]  # fmt: skip
    with _serve(command, socket, cpu_list) as backend:
        yield backend


@contextlib.contextmanager
def c(
    shared_dir: Path,
    folder: Path,
    *,
    cache: str = "none",
    tag: str = "share",
    options: Sequence[str] = (),
    cpu_list: str = "",
) -> Iterator[Backend]:
    """Serve a directory with the C virtiofsd of QEMU 7.2; arguments as those of ours."""
    socket = folder / f"{tag}.sock"
    command = [
        *assets.loader(assets.VIRTIOFSD_C_TREE), str(assets.VIRTIOFSD_C_TREE / "usr/lib/qemu/virtiofsd"),
        f"--socket-path={socket}", "-o", f"source={shared_dir}", "-o", f"cache={cache}", *options,
    ]  # fmt: skip
    with _serve(command, socket, cpu_list) as backend:
        yield backend


@contextlib.contextmanager
def for_uml(backend: Backend, *, tag: str | None = None) -> Iterator[Backend]:
    """Let User-Mode Linux use the Rust or C virtiofsd (uml_proxy.py says why): yields it with another socket.

    Args:
        backend: The backend.
        tag: For the C virtiofsd, which does not tell it.
    """
    socket = backend.socket.with_suffix(".uml.sock")
    command = [sys.executable, "-m", "tests.lab.uml_proxy", str(socket), str(backend.socket)]
    if tag is not None:
        command += ["--tag", tag]
    with _serve(command, socket, ""):
        yield dataclasses.replace(backend, socket=socket)


@contextlib.contextmanager
def daemon(folder: Path, table: str) -> Iterator[Backend]:
    """Run a coherenced of its own.

    Args:
        folder: For the control socket and the log.
        table: Name of its version table, as "vt-test-1".
    """
    socket = folder / "coherenced.sock"
    command = [console_script("coherenced"), "--table", table, "--socket", str(socket)]
    with _serve(command, socket, "") as backend:
        yield backend


def counters(control: Path) -> dict[str, dict[str, int]]:
    """What the backends of a domain count, by guest; control: the socket of its daemon."""
    command = [console_script("coherencectl"), "status", "--json", "--socket", str(control)]
    status = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {backend["guest"]: backend["counters"] or {} for backend in status["backends"]}


def remove_table(table: str) -> None:
    """Remove a version table, by the name that daemon() has, and what a coherenced leaves beside it."""
    for left in Path("/dev/shm").glob(f"{DomainPaths(table).name}*"):
        left.unlink()


def console_script(name: str) -> str:
    """Path of one of our commands in the running Python's environment."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise LabError(f"{name} is not installed: pip install -e . in the checkout")
    return str(path)


def listens(socket: Path) -> bool:
    """Whether somebody listens on a socket, told without connecting: virtiofsd serves one connection."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *path = line.split(maxsplit=7)
        # __SO_ACCEPTCON, linux/net.h
        if path == [str(socket)] and int(flags, 16) & 0x10000:
            return True
    return False


@contextlib.contextmanager
def _serve(command: Sequence[str], socket: Path, cpu_list: str) -> Iterator[Backend]:
    pinned = ["taskset", "--cpu-list", cpu_list] if cpu_list else []
    with Process([*pinned, *command], log=socket.with_suffix(".log")) as process:
        deadline = time.monotonic() + READY_TIMEOUT
        while not listens(socket):
            if not process.running or time.monotonic() > deadline:
                raise LabError(f"{Path(command[0]).name} does not listen on {socket}; it wrote:\n{process.output()}")
            time.sleep(0.01)
        yield Backend(process, socket)
        process.terminate()


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _task_seconds(pid: int) -> float:
    """Time of all threads on a processor (Documentation/scheduler/sched-stats.rst)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
