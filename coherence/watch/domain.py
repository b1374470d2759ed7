"""What a host watch tells the domain: bumps, voided marks, a raised floor; and what it counts while it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from coherence.table import Table

What = Literal["create", "delete", "modify", "attrib", "move from", "move to"]
OnChange = Callable[[str, What, bytes], None]
OnData = Callable[[int], None]

HOST = "host"
ROOT_SLOT = 1


class LeaseTable(Protocol):
    """What the host watch needs of coherence.leases.Leases."""

    def origin(self, slot: int) -> tuple[int, int] | None:
        """Holder and number of the last change of a slot, None where they are not known."""

    def locked(self, slot: int) -> bool:
        """Whether a backend is changing something in the slot's bucket now."""

    def changed(self, slot: int, data: bool) -> None:
        """Note a change on the host, before the bump."""

    def uncover(self) -> None:
        """Void what backends remember as being watched."""

    def want_markers(self, wanted: bool) -> None:
        """Have backends write the number of each change into their journals, or not."""


@dataclass(slots=True)
class Counts:
    """Since the daemon started: changes seen, those of them that were bumped or were the backends' own, and trouble."""

    events: int = 0
    bumped: int = 0
    own: int = 0
    overflows: int = 0
    refused: int = 0


class Domain:
    """The tables of one domain, as a host watch acts on them.

    Args:
        table: mapped writable.
        leases: of the same table.
        raise_floor: makes everything that is cached invalid.

    Attributes:
        counts: what the status shows.
        on_data: called for each inode slot that is bumped because data has changed, after that.
        on_change: called for each change with who made it ("host" or a guest), what it was, and the path; None
            while nobody wants to know. Changes of one kind to one name in quick succession are told once.
    """

    def __init__(self, table: Table, leases: LeaseTable, raise_floor: Callable[[], None]) -> None:
        self.table = table
        self.leases = leases
        self.raise_floor = raise_floor
        self.counts = Counts()
        self.on_data: OnData = lambda slot: None
        self.on_change: OnChange | None = None

    def bump(self, names: Iterable[tuple[int, bytes]], inodes: Mapping[int, bool]) -> None:
        """Bump names, then inodes.

        Args:
            names: pairs of a directory's inode slot and a name in it.
            inodes: inode slots, with whether a file's data or a directory's list has changed.
        """
        for directory, name in names:
            self._bump(self.table.name_slot(directory, name), False)
            if self.table.is_root(directory):
                self._bump(self.table.name_slot(ROOT_SLOT, name), False)
        for slot, data in inodes.items():
            self._bump(slot, data)
            if self.table.is_root(slot):
                self._bump(ROOT_SLOT, data)
            if data:
                self.on_data(slot)

    def uncover(self) -> None:
        """Something that was watched may not be any more: nothing cached counts, and all is to be watched anew."""
        # The marks first: what is fetched after the floor was raised must not rely on an old one.
        self.leases.uncover()
        self.raise_floor()

    def _bump(self, slot: int, data: bool) -> None:
        self.leases.changed(slot, data)
        self.table.bump(slot)
