"""What is measured: two guests that share a directory, mounted once in each mode, all on one processor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from coherent_vfs.coherence.shm.paths import DomainPaths
from tests.lab import assets, backends
from tests.lab.backends import Backend
from tests.lab.guest import Guest, boot
from tests.lab.paths import LabError

PROGRAM = Path(__file__).with_name("loops.c")
MEMORY = {"qemu": 640, "uml": 512}
"""Of a guest, MiB: it keeps the inodes of two large trees."""
CLOCK_ERROR = 0.05
"""Part by which a guest's clock may run faster or slower than the host's."""
AGE = 6.0
"""Seconds after which the longest lease of 1 s is given: four times that, and some more."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way of caching.

    Attributes:
        name: Its name here, its tag, and the place /NAME where guests have it mounted.
        title: For people.
        cache: The backend's --cache.
        lease_max: Seconds, of a domain of its own; None: in no domain.
        ours: vfs-backend, not the Rust virtiofsd.
    """

    name: str
    title: str
    cache: str
    lease_max: float | None = None
    ours: bool = True


NONE = Mode("none", "vfs-backend none", "none")
SHARED = Mode("shared", "vfs-backend shared", "shared", 1.0)
HALF = Mode("half", "shared, lease 0.5 s", "shared", 0.5)
DOUBLE = Mode("double", "shared, lease 2 s", "shared", 2.0)
NEVER = Mode("never", "Rust virtiofsd never", "never", ours=False)
AUTO = Mode("auto", "Rust virtiofsd auto", "auto", ours=False)
MODES = (NONE, SHARED, NEVER, AUTO, HALF, DOUBLE)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a loop in the guest took.

    Attributes:
        count: Operations made.
        mean, median, least: Microseconds for one; the last two of batches of some hundred.
        requests: That the backend had meanwhile; None where it has no count.
        cpu: Seconds of processor time of the backend.
    """

    count: int
    mean: float
    median: float
    least: float
    requests: int | None
    cpu: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Guests, backends and daemons, running.

    Attributes:
        share: The directory on the host; guests have it at /NAME of each mode.
        looker: The guest that is measured.
        other: A guest with the same mounts.
        served: The looker's backends, by mode.
        daemons: Control sockets, by mode in a domain.
        say: Receives progress lines.
    """

    share: Path
    looker: Guest
    other: Guest
    served: Mapping[Mode, Backend]
    daemons: Mapping[Mode, Path]
    say: Callable[[str], None]

    def loop(self, operation: str, mode: Mode, place: str, files: int, seconds: float) -> Loop:
        """Repeat an operation (of loops.c) on the files of a folder of the share, in the guest that is measured."""
        before = self.counters(mode).get("requests")
        cpu = self.served[mode].cpu_seconds()
        command = f"/run/loops {operation} /run/{mode.name} {place} {files} {seconds}"
        count, *nanoseconds = self.looker.check(command, timeout=seconds + 120).split()
        cpu = self.served[mode].cpu_seconds() - cpu
        requests = None if before is None else self.counters(mode)["requests"] - before
        mean, median, least = (float(word) / 1e3 for word in nanoseconds)
        return Loop(int(count), mean, median, least, requests, cpu)

    def counters(self, mode: Mode) -> dict[str, int]:
        """Counters of the looker's backend; none where the mode has no domain."""
        if mode not in self.daemons:
            return {}
        return backends.counters(self.daemons[mode])["looker"]

    def make_files(self, folder: str, count: int) -> None:
        """Make a folder of the share with the files that most loops go over."""
        place = self.share / folder
        place.mkdir()
        for number in range(count):
            (place / f"f{number:05d}").write_bytes(bytes(4096 if number == 0 else 0))

    def make_folders(self, folder: str, count: int) -> None:
        """Make a folder of the share with what `hold` and `change` go over."""
        for number in range(count):
            place = self.share / folder / f"d{number:05d}"
            place.mkdir(parents=True)
            (place / "f").write_bytes(b"12345")

    def remove(self, folder: str) -> None:
        shutil.rmtree(self.share / folder)

    def drop_names(self) -> None:
        """Let the looker forget names and inodes, and the backends have time for its FORGETs."""
        self.looker.check("sync; echo 2 > /proc/sys/vm/drop_caches; sleep 1")


def age(seconds: float = AGE) -> None:
    """Wait until what was made before is old enough for the longest lease."""
    time.sleep(seconds)


@contextlib.contextmanager
def open_stage(kind: str, cpu: str, say: Callable[[str], None]) -> Iterator[Stage]:
    """Start everything.

    Args:
        kind: Of the guests, "qemu" or "uml".
        cpu: The processor that guests and backends share.
        say: Receives progress lines.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modes-")))
        share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modes-", dir="/dev/shm")))
        share.chmod(0o755)
        domains = {mode: _domain(mode, folder, cpu, stack) for mode in MODES if mode.lease_max is not None}
        guests: dict[str, Guest] = {}
        served: dict[str, dict[Mode, Backend]] = {}
        for name in ("looker", "other"):
            place = folder / name
            place.mkdir()
            served[name] = {mode: _backend(mode, name, share, place, cpu, domains, stack) for mode in MODES}
            guests[name] = _guest(kind, cpu, served[name], stack)
        daemons = {mode: daemon for mode, (_, daemon) in domains.items()}
        yield Stage(share, guests["looker"], guests["other"], served["looker"], daemons, say)


def _domain(mode: Mode, folder: Path, cpu: str, stack: contextlib.ExitStack) -> tuple[DomainPaths, Path]:
    paths = DomainPaths(f"vt-modes-{os.getpid()}-{secrets.token_hex(3)}")
    stack.callback(backends.remove_table, paths.name)
    place = folder / mode.name
    place.mkdir()
    daemon = stack.enter_context(backends.daemon(place, paths.name))
    # A host has more than one processor. Where guests write without end, coherenced has work to do beside them.
    if others := os.sched_getaffinity(0) - {int(cpu)}:
        os.sched_setaffinity(daemon.pid, others)
    return paths, daemon.socket


def _backend(
    mode: Mode,
    guest: str,
    share: Path,
    folder: Path,
    cpu: str,
    domains: Mapping[Mode, tuple[DomainPaths, Path]],
    stack: contextlib.ExitStack,
) -> Backend:
    if not mode.ours:
        served = backends.rust(share, folder, cache=mode.cache, tag=mode.name, cpu_list=cpu)
        return stack.enter_context(served)
    options: list[str] = []
    if mode in domains:
        paths, daemon = domains[mode]
        options = ["--coherence", str(paths.table), "--coherence-socket", str(daemon), "--guest", guest]
        options += ["--lease-max", str(mode.lease_max)]
    served = backends.ours(share, folder, cache=mode.cache, tag=mode.name, options=options, cpu_list=cpu)
    return stack.enter_context(served)


def _check_clock(guest: Guest) -> None:
    """A guest that booted on a busy host may have measured its TSC wrongly: its times mean nothing then."""
    first = _uptime(guest)
    time.sleep(2)
    second = _uptime(guest)
    # The guest read its clock at some moment between the question and the answer.
    least, most = second.asked - first.answered, second.answered - first.asked
    seconds = second.clock - first.clock
    if not least * (1 - CLOCK_ERROR) <= seconds <= most * (1 + CLOCK_ERROR):
        raise LabError(
            f"a guest's clock went on by {seconds} s in {least:.2f} to {most:.2f} s: run again on a quiet host"
        )


@dataclasses.dataclass(frozen=True)
class _Uptime:
    """A guest's clock, and the host's when it was asked for and when it was told."""

    asked: float
    clock: float
    answered: float


def _uptime(guest: Guest) -> _Uptime:
    asked = time.monotonic()
    clock = float(guest.check("cut -d' ' -f1 /proc/uptime"))
    return _Uptime(asked, clock, time.monotonic())


def _guest(kind: str, cpu: str, served: Mapping[Mode, Backend], stack: contextlib.ExitStack) -> Guest:
    sockets = {}
    for mode, backend in served.items():
        front = backend
        if kind == "uml" and not mode.ours:
            front = stack.enter_context(backends.for_uml(backend))
        sockets[mode.name] = front.socket
    root = "host" if kind == "uml" else f"image:{assets.userland_image()}"
    guest = stack.enter_context(boot(kind, shares=sockets, root=root, memory=MEMORY[kind], cpu_list=cpu))
    _check_clock(guest)
    for mode in served:
        guest.mount(mode.name, f"/run/{mode.name}")
    guest.put_file("/run/loops", assets.compile_static(PROGRAM).read_bytes())
    return guest
