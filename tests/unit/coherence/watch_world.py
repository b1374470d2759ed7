"""A watched directory with a table, for tests of the host watch: what changed in it, told by slots."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from coherent_vfs.coherence.daemon.watch.inotify import InotifyWatch
from coherent_vfs.coherence.daemon.watch.invalidator import Domain, What
from coherent_vfs.coherence.protocol.messages import FloorReason
from coherent_vfs.coherence.shm.table import SLOTS_OFFSET, Table, journal_content

CHANGES_OFFSET = 72
PAGE = 4096
EMPTY = bytes(PAGE)
SECONDS = 60.0


def slots_above(table_path: Path, stamp: int) -> set[int]:
    """The slots of a table whose values are above a stamp."""
    found = set()
    with table_path.open("rb") as file:
        file.seek(SLOTS_OFFSET)
        first = 0
        while page := file.read(PAGE):
            # Nearly all are empty.
            if page != EMPTY:
                found |= {first + at for at, value in enumerate(memoryview(page).cast("Q")) if value > stamp}
            first += PAGE // 8
    return found


class FakeLeases:
    """A lease table that says what a test wants."""

    def __init__(self) -> None:
        self.origins: dict[int, tuple[int, int]] = {}
        self.locks: set[int] = set()
        self.told: list[tuple[int, bool]] = []
        self.watch_epochs_ended = 0
        self.markers_wanted = False

    def origin(self, slot: int) -> tuple[int, int] | None:
        return self.origins.get(slot)

    def locked(self, slot: int) -> bool:
        return slot in self.locks

    def changed(self, slot: int, data: bool) -> None:
        self.told.append((slot, data))

    def end_watch_epoch(self) -> None:
        self.watch_epochs_ended += 1

    def want_markers(self, wanted: bool) -> None:
        self.markers_wanted = wanted


class Backend:
    """Makes changes and bumps them, as a backend does for its guest."""

    def __init__(self, world: World, key: int, holder: int, guest: str) -> None:
        self.world = world
        self.key = key
        self.backend_id = holder
        self.number = 0
        self.journal = world.directory.parent / f"journal.{key}"
        self.journal.write_bytes(journal_content(world.table.domain, holder))
        self._fd = os.open(self.journal, os.O_RDWR)
        world.watch.join(key, holder, guest, self.journal, os.getpid())

    def close(self) -> None:
        os.close(self._fd)

    def ask(self, path: Path) -> bool:
        """Ask for a watch."""
        return self.world.watch.watch(self.key, os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))

    def mark(self, *slots: int) -> None:
        """What comes between the system call and the bumps."""
        self.number += 1
        for slot in slots:
            self.world.leases.origins[slot] = self.backend_id, self.number
        os.pwrite(self._fd, struct.pack("<Q", self.number), CHANGES_OFFSET)

    def bump(self, *slots: int) -> None:
        """The bumps."""
        for slot in slots:
            self.world.table.bump(slot)

    def change(self, call: Callable[[], object], *slots: int) -> None:
        """A whole change of these slots."""
        call()
        self.mark(*slots)
        self.bump(*slots)


class World:
    """A directory, a table, a host watch, and what it tells."""

    watch: InotifyWatch

    def __init__(self, directory: Path, table: Table, table_path: Path) -> None:
        self.directory = directory
        self.table = table
        self._table_path = table_path
        self.leases = FakeLeases()
        self.floors = 0
        self.seen: list[tuple[str, What, bytes]] = []
        self.domain = Domain(table, self.leases, self._raise_floor)
        self.domain.on_change = lambda who, what, path: self.seen.append((who, what, path))
        self.watch = InotifyWatch(self.domain)

    def _raise_floor(self, reason: FloorReason) -> None:
        self.floors += 1
        self.table.raise_floor()

    def inode(self, path: Path) -> int:
        """The inode slot of what has this path now."""
        status = path.lstat()
        return self.table.inode_slot(status.st_dev, status.st_ino)

    def name(self, path: Path) -> int:
        """The slot of the path's name."""
        return self.table.name_slot(self.inode(path.parent), os.fsencode(path.name))

    def settle(self) -> None:
        """Process events until nothing is put aside any more."""
        end = time.monotonic() + SECONDS
        self.watch.process()
        while self.watch.busy:
            assert time.monotonic() < end, "a change is never judged"
            self.watch.process()

    def bumped(self, call: Callable[[], object]) -> set[int]:
        """The slots that were bumped for what the call did, and nothing before it."""
        self.settle()
        stamp = self.table.stamp()
        call()
        self.settle()
        return slots_above(self._table_path, stamp)
