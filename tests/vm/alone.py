"""One stock guest in mode shared, in a domain of its own, whose requests can be counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab import backends
from tests.lab.guest import Guest, boot


@dataclass
class Alone:
    """A guest that has the share at /mnt; its backend's daemon counts its requests.

    Attributes:
        control: the daemon's socket.
    """

    vm: Guest
    control: Path

    def requests(self, command: str) -> int:
        """How many requests a command in the guest takes."""
        before = self._count()
        self.vm.check(command)
        return self._count() - before

    def _count(self) -> int:
        (counters,) = backends.counters(self.control).values()
        return counters["requests"]


@contextmanager
def alone_in_domain(kind: str, share: Path, run_dir: Path, *options: str, memory: int = 256) -> Iterator[Alone]:
    """Start it.

    Args:
        kind: of guest.
        share: the directory to share.
        run_dir: for sockets; its name is that of the table, too.
        options: more options of the backend.
        memory: of the guest, MiB.
    """
    table = f"/vt-{run_dir.name}"
    with ExitStack() as stack:
        stack.callback(backends.remove_table, table)
        daemon = stack.enter_context(backends.daemon(run_dir, table))
        domain = ["--coherence", f"/dev/shm{table}", "--coherence-socket", str(daemon.socket)]
        backend = stack.enter_context(backends.ours(share, run_dir, cache="shared", options=[*domain, *options]))
        vm = stack.enter_context(boot(kind, shares={"share": backend.socket}, memory=memory))
        vm.mount("share", "/mnt")
        yield Alone(vm, daemon.socket)


@contextmanager
def guest_in_mode(kind: str, share: Path, run_dir: Path, cache: str) -> Iterator[Guest]:
    """A stock guest in any cache mode that has the share at /mnt; in shared in a domain of its own.

    Args:
        kind: of guest.
        share: the directory to share.
        run_dir: for sockets.
        cache: the mode.
    """
    if cache == "shared":
        with alone_in_domain(kind, share, run_dir, memory=128) as alone:
            yield alone.vm
        return
    with (
        backends.ours(share, run_dir, cache=cache) as backend,
        boot(kind, shares={"share": backend.socket}, memory=128) as vm,
    ):
        vm.mount("share", "/mnt")
        yield vm
