"""Where runs take place: guests that share directories, one for each mode, and the host."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coherence.places import Places
from guest.guest import Guest as UserSpaceGuest
from tests.lab import backends
from tests.lab.guest import boot
from tests.litmus.catalogue import ALL
from tests.litmus.litmus import Litmus, Mode
from tests.litmus.mapped import MAPPED
from tests.litmus.programs import Host, Stock
from tests.litmus.run import Player
from tests.litmus.side_channel import SideChannel
from tests.litmus.user_space import UserSpace

STOCK_MODES = (Mode.NONE, Mode.AUTO, Mode.ALWAYS, Mode.SHARED, Mode.MIXED)
USER_SPACE_MODES = (*STOCK_MODES[:-1], Mode.AWARE, Mode.MIXED)
DAX_MODES = (Mode.AUTO, Mode.ALWAYS, Mode.DAX)
"""Without DAX each guest has pages of its own, which shows that the tests can fail."""
DAX_WINDOW = "64M"


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
    """

    root: Path
    side: SideChannel
    guests: Callable[[Mode], Sequence[Player]]
    host: Host
    tests: tuple[Litmus, ...]
    modes: tuple[Mode, ...]
    host_modes: tuple[Mode, ...]


@contextmanager
def stock_guests(kind: str, options: Sequence[str] = ()) -> Iterator[Arena]:
    """Boot guests with a stock kernel.

    Args:
        kind: "qemu", "uml", or "qemu-dax", which play the tests of mapped files.
        options: more options of the backends that are in a domain.
    """
    dax = kind == "qemu-dax"
    tests, modes, host_modes = (MAPPED, DAX_MODES, (Mode.DAX,)) if dax else (ALL, STOCK_MODES, STOCK_MODES[:-1])
    with _shared(modes, options) as shared, ExitStack() as stack:

        def player(number: int) -> Stock:
            shares = {mode.value: shared.backend(mode, number) for mode in modes}
            vm = stack.enter_context(boot(kind, shares=shares, memory=256, **shared.side.machine(kind)))
            for mode in modes:
                vm.mount(mode.value, f"/mnt/{mode}", "dax=always" if mode is Mode.DAX else "")
            return Stock(kind, vm)

        with ThreadPoolExecutor() as pool:
            players = list(pool.map(player, range(1, _guests(tests) + 1)))
        yield Arena(shared.root, shared.side, lambda mode: players, Host(shared.root), tests, modes, host_modes)
        shared.check()


@contextmanager
def user_space_guests(options: Sequence[str] = ()) -> Iterator[Arena]:
    """Connect user-space guests; options as those of stock_guests."""
    with _shared(USER_SPACE_MODES, options) as shared, ExitStack() as stack:
        players: dict[Mode, list[UserSpace]] = {}
        for mode in USER_SPACE_MODES:
            for number in range(1, _guests(ALL) + 1):
                table = shared.table if mode.aware(number) else None
                guest = stack.enter_context(UserSpaceGuest.connect(shared.backend(mode, number), table=table))
                players.setdefault(mode, []).append(UserSpace(guest))
        yield Arena(
            shared.root,
            shared.side,
            players.__getitem__,
            Host(shared.root),
            ALL,
            USER_SPACE_MODES,
            USER_SPACE_MODES[:-1],
        )
        shared.check()


def _guests(tests: Sequence[Litmus]) -> int:
    return max(len(test.parties) for test in tests)


class _Shared:
    """The directories, a coherenced, and the backends."""

    def __init__(self, folder: Path, modes: Sequence[Mode], options: Sequence[str], stack: ExitStack) -> None:
        self._folder = folder
        self._options = options
        self._stack = stack
        self._backends: list[backends.Backend] = []
        self.root = folder / "root"
        for mode in modes:
            (self.root / mode).mkdir(parents=True)
        self.side = stack.enter_context(SideChannel())
        places = Places(f"/vt-litmus-{os.getpid()}-{secrets.token_hex(4)}")
        stack.callback(_remove_all, places.table)
        self.table = places.table
        self._daemon = stack.enter_context(backends.daemon(folder, places.name))

    def backend(self, mode: Mode, number: int) -> Path:
        """Start the backend of a guest for a mode; its socket."""
        folder = self._folder / f"{number}"
        folder.mkdir(exist_ok=True)
        options: list[str] = []
        if mode.in_domain:
            options += ["--coherence", str(self.table), "--coherence-socket", str(self._daemon.socket)]
            options += ["--guest", f"{mode}-{number}", *self._options]
        if mode is Mode.DAX:
            options += ["--dax", "always", "--dax-window", DAX_WINDOW]
        served = backends.ours(self.root / mode, folder, cache=mode.cache(number), tag=mode.value, options=options)
        backend = self._stack.enter_context(served)
        self._backends.append(backend)
        return backend.socket

    def check(self) -> None:
        """No backend has anything to complain about."""
        assert {backend.process.output() for backend in self._backends} == {""}


@contextmanager
def _shared(modes: Sequence[Mode], options: Sequence[str]) -> Iterator[_Shared]:
    # Not in /tmp, which may be tmpfs: a share is usually on a disk. The path is short for the sockets' sake.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="litmus-") as folder, ExitStack() as stack:
        yield _Shared(Path(folder), modes, options, stack)


def _remove_all(table: Path) -> None:
    """Remove a table and what stands beside it."""
    for path in table.parent.glob(f"{table.name}*"):
        path.unlink()
