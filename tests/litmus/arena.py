"""Where runs take place: guests that share directories, one for each mode, and the host."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.guest.guest import Guest as UserSpaceGuest
from tests.coarse_file_system import WITHOUT_LINKS, coarse_file_system
from tests.lab import backends
from tests.lab.guest import boot
from tests.lab.paths import LabError
from tests.litmus.catalogue import ALL
from tests.litmus.litmus import Litmus, Mode
from tests.litmus.mapped import MAPPED
from tests.litmus.programs import Host, Stock
from tests.litmus.run import Player
from tests.litmus.side_channel import SideChannel
from tests.litmus.user_space import UserSpace

STOCK_HOST_MODES = (Mode.NONE, Mode.AUTO, Mode.ALWAYS, Mode.SHARED)
STOCK_MODES = (*STOCK_HOST_MODES, Mode.MIXED, Mode.ISOLATED)
USER_SPACE_HOST_MODES = (*STOCK_HOST_MODES, Mode.AWARE)
USER_SPACE_MODES = (*USER_SPACE_HOST_MODES, Mode.MIXED)
DAX_MODES = (Mode.AUTO, Mode.ALWAYS, Mode.DAX)
"""Without DAX each guest has pages of its own, which shows that the tests can fail."""
DAX_WINDOW = "64M"
LEASE_LANES, USER_SPACE_LANES, DAX_LANES = 40, 12, 12
"""User-space guests are threads of one Python; with DAX, what a window has paths for."""


@dataclass(frozen=True)
class Arena:
    """Guests and what they share.

    Attributes:
        root: on the host; the directory of each mode is in it.
        side: the side channel.
        guests: the players of a mode, guest 1 first.
        host: the host as a player.
        tests: what is played here.
        modes: how the guests cache.
        host_modes: the same, with the host as a party.
        lease_lanes: how many rounds go on at once where changes may wait for leases. So many that waiting holds nobody
            up, and so few that a look is not late.
    """

    root: Path
    side: SideChannel
    guests: Callable[[Mode], Sequence[Player]]
    host: Host
    tests: tuple[Litmus, ...]
    modes: tuple[Mode, ...]
    host_modes: tuple[Mode, ...]
    lease_lanes: int


@contextmanager
def stock_guests(
    kind: str, options: Sequence[str] = (), only: Collection[Mode] = frozenset(Mode), host_fs: str = ""
) -> Iterator[Arena]:
    """Boot guests with a stock kernel.

    Args:
        kind: "qemu", "uml", or "qemu-dax", which play the tests of mapped files.
        options: more options of the backends that are in a domain.
        only: modes, of those that such guests have.
        host_fs: what file system the shares are on, one of MAKERS; empty: that of /var/tmp. One without links has fewer
            tests.
    """
    dax = kind == "qemu-dax"
    tests = _possible(MAPPED if dax else ALL, host_fs)
    modes = _chosen(DAX_MODES if dax else STOCK_MODES, only)
    host_modes = _chosen((Mode.DAX,) if dax else STOCK_HOST_MODES, only)
    with _shared(modes, options, host_fs) as shared, ExitStack() as stack:

        def player(number: int) -> Stock:
            shares = {mode.value: shared.backend(mode, number) for mode in modes}
            vm = stack.enter_context(boot(kind, shares=shares, memory=256, **shared.side.machine(kind)))
            for mode in modes:
                vm.mount(mode.value, f"/mnt/{mode}", "dax=always" if mode is Mode.DAX else "")
            return Stock(kind, vm)

        with ThreadPoolExecutor() as pool:
            players = list(pool.map(player, range(1, _guests(tests) + 1)))
        host, lanes = Host(shared.root), DAX_LANES if dax else LEASE_LANES
        yield Arena(shared.root, shared.side, lambda mode: players, host, tests, modes, host_modes, lanes)
        shared.check()


@contextmanager
def user_space_guests(
    options: Sequence[str] = (), only: Collection[Mode] = frozenset(Mode), host_fs: str = ""
) -> Iterator[Arena]:
    """Connect user-space guests; arguments as those of stock_guests."""
    modes, host_modes = _chosen(USER_SPACE_MODES, only), _chosen(USER_SPACE_HOST_MODES, only)
    tests = _possible(ALL, host_fs)
    with _shared(modes, options, host_fs) as shared, ExitStack() as stack:
        players: dict[Mode, list[UserSpace]] = {}
        for mode in modes:
            for number in range(1, _guests(tests) + 1):
                table = shared.table if mode.aware(number) else None
                guest = stack.enter_context(UserSpaceGuest.connect(shared.backend(mode, number), table=table))
                players.setdefault(mode, []).append(UserSpace(guest))
        yield Arena(
            shared.root,
            shared.side,
            players.__getitem__,
            Host(shared.root),
            tests,
            modes,
            host_modes,
            USER_SPACE_LANES,
        )
        shared.check()


def _chosen(modes: Sequence[Mode], only: Collection[Mode]) -> tuple[Mode, ...]:
    return tuple(mode for mode in modes if mode in only)


def _possible(tests: tuple[Litmus, ...], host_fs: str) -> tuple[Litmus, ...]:
    return tuple(test for test in tests if host_fs not in WITHOUT_LINKS or not test.needs_links)


def _guests(tests: Sequence[Litmus]) -> int:
    return max(len(test.parties) for test in tests)


class _Daemon(NamedTuple):
    table: Path
    socket: Path


class _Shared:
    """The directories, a coherenced for all, in mode isolated one for each guest, and the backends."""

    def __init__(
        self, folder: Path, modes: Sequence[Mode], options: Sequence[str], host_fs: str, stack: ExitStack
    ) -> None:
        self._folder = folder
        self._options = options
        self._stack = stack
        self._backends: list[backends.Backend] = []
        self.root = stack.enter_context(coarse_file_system(host_fs, folder)) if host_fs else folder / "root"
        for mode in modes:
            (self.root / mode).mkdir(parents=True)
        self.side = stack.enter_context(SideChannel())
        self._daemons = {0: self._start_daemon(0)}

    @property
    def table(self) -> Path:
        """The version table of the domain."""
        return self._daemons[0].table

    def backend(self, mode: Mode, number: int) -> Path:
        """Start the backend of a guest for a mode; its socket."""
        folder = self._folder / f"{number}"
        folder.mkdir(exist_ok=True)
        options: list[str] = []
        if mode.in_domain:
            alone = number if mode is Mode.ISOLATED else 0
            if alone not in self._daemons:
                self._daemons[alone] = self._start_daemon(alone)
            daemon = self._daemons[alone]
            options += ["--coherence", str(daemon.table), "--coherence-socket", str(daemon.socket)]
            options += ["--guest", f"{mode}-{number}", *self._options]
        if mode is Mode.DAX:
            options += ["--dax", "always", "--dax-window", DAX_WINDOW]
        served = backends.ours(self.root / mode, folder, cache=mode.cache(number), tag=mode.value, options=options)
        backend = self._stack.enter_context(served)
        self._backends.append(backend)
        return backend.socket

    def _start_daemon(self, number: int) -> _Daemon:
        folder = self._folder / f"daemon{number}"
        folder.mkdir()
        paths = DomainPaths(f"vt-litmus-{os.getpid()}-{secrets.token_hex(4)}")
        self._stack.callback(backends.remove_table, paths.name)
        backend = self._stack.enter_context(backends.daemon(folder, paths.name))
        return _Daemon(paths.table, backend.socket)

    def check(self) -> None:
        """No backend has anything to complain about."""
        if complaints := "".join(backend.process.output() for backend in self._backends):
            raise LabError(f"a backend complained: {complaints.strip()}")


@contextmanager
def _shared(modes: Sequence[Mode], options: Sequence[str], host_fs: str) -> Iterator[_Shared]:
    # Not in /tmp, which may be tmpfs: a share is usually on a disk. The path is short for the sockets' sake.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="litmus-") as folder, ExitStack() as stack:
        yield _Shared(Path(folder), modes, options, host_fs, stack)
