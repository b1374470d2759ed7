"""What is measured: guests on one QEMU that have a directory mounted with DAX and without, all on one processor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from coherent_vfs.coherence.shm.paths import DomainPaths
from tests.lab import assets, backends
from tests.lab.backends import Backend
from tests.lab.guest import Guest, boot

PROGRAM = Path(__file__).with_name("io.c")


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to have the directory.

    Attributes:
        name: Its name here, its tag, and the place /NAME where guests have it mounted.
        title: For people.
        cache: The backend's --cache.
        ours: vfs-backend, not the Rust virtiofsd.
        dax: Files are mapped.
    """

    name: str
    title: str
    cache: str
    ours: bool = True
    dax: bool = False


DAX = Way("dax", "shared, DAX", "shared", dax=True)
SHARED = Way("shared", "shared", "shared")
NEVER = Way("never", "Rust never", "never", ours=False)
AUTO = Way("auto", "Rust auto", "auto", ours=False)
WAYS = (DAX, SHARED, NEVER, AUTO)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Guests, their backends and coherenced, running.

    Attributes:
        share: The directory on the host; guests have it at /NAME of each way.
        guests: The guests; each has each way.
        served: The backends, all of all guests.
        say: Receives progress lines.
    """

    share: Path
    guests: Sequence[Guest]
    served: Sequence[Backend]
    say: Callable[[str], None]

    def file(self, name: str, size: int) -> Path:
        """Make a file of so many MiB."""
        path = self.share / name
        with path.open("wb") as file:
            for _ in range(size):
                file.write(os.urandom(1 << 20))
        os.sync()
        return path


@contextlib.contextmanager
def open_stage(
    ways: Sequence[Way], count: int, memory: int, window: str, cpu: str, say: Callable[[str], None]
) -> Iterator[Stage]:
    """Start everything.

    Args:
        ways: What each guest has mounted.
        count: How many guests.
        memory: Of each, MiB.
        window: Size of its window.
        cpu: The processor that guests and backends share.
        say: Receives progress lines.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dax-")))
        # On a disk, as what is shared is; it stays in the host's page cache.
        share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dax-", dir="/var/tmp")))
        share.chmod(0o755)
        paths = DomainPaths(f"vt-dax-{os.getpid()}-{secrets.token_hex(3)}")
        stack.callback(backends.remove_table, paths.name)
        daemon = stack.enter_context(backends.daemon(folder, paths.name))
        if others := os.sched_getaffinity(0) - {int(cpu)}:
            os.sched_setaffinity(daemon.pid, others)
        coherence = ["--coherence", str(paths.table), "--coherence-socket", str(daemon.socket)]
        guests: list[Guest] = []
        served: list[Backend] = []
        for number in range(count):
            place = folder / str(number)
            place.mkdir()
            mine: dict[Way, Backend] = {}
            for way in ways:
                options = [*coherence, "--guest", f"{way.name}{number}"] if way.ours else []
                options += ["--dax", "always", "--dax-window", window] if way.dax else []
                start = backends.ours if way.ours else backends.rust
                backend = start(share, place, cache=way.cache, tag=way.name, options=options, cpu_list=cpu)
                mine[way] = stack.enter_context(backend)
            guests.append(_guest(mine, memory, cpu, stack))
            served += mine.values()
        yield Stage(share, guests, served, say)


def mount(guest: Guest, way: Way) -> None:
    """Mount it in a guest: nothing is mapped or cached then."""
    guest.mount(way.name, f"/{way.name}", "dax=always" if way.dax else "")


def _guest(served: Mapping[Way, Backend], memory: int, cpu: str, stack: contextlib.ExitStack) -> Guest:
    shares = {way.name: backend.socket for way, backend in served.items() if way.ours}
    # The other devices of this QEMU are for backends that leave the configuration to it.
    extra: list[str] = []
    for way, backend in served.items():
        if not way.ours:
            extra += ["-chardev", f"socket,id={way.name},path={backend.socket}"]
            extra += ["-device", f"vhost-user-fs-pci,chardev={way.name},tag={way.name},queue-size=128"]
    guest = stack.enter_context(boot("qemu-dax", shares=shares, memory=memory, cpu_list=cpu, extra=extra))
    for way in served:
        mount(guest, way)
    guest.put_file("/io", assets.compile_static(PROGRAM).read_bytes())
    return guest
