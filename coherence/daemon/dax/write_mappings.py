"""Pins the slots of files with writable mappings: stores into them bump nothing, so no guest may cache the file."""

from __future__ import annotations

import asyncio
from typing import Protocol

AGAIN_SECONDS = 0.002


class Table(Protocol):
    """What it needs of coherence.shm.table.Table."""

    def pin(self, slot: int) -> None:
        """Make everything that was cached by a slot invalid, until unpin."""

    def pinned(self) -> list[int]:
        """The pinned slots."""


class Leases(Protocol):
    """What it needs of coherence.shm.leases.Leases."""

    def unpin(self, slot: int) -> bool:
        """Unpin a slot. Returns false if it has to be tried again."""


class WriteMappings:
    """Keeps the slots of files with writable mappings pinned.

    Args:
        table: the version table.
        leases: its lease table.
    """

    def __init__(self, table: Table, leases: Leases) -> None:
        self._table = table
        self._leases = leases
        self._wanted: set[int] = set()
        self._ending: set[int] = set()

    def start(self) -> None:
        """Unpin what an earlier daemon has pinned: those mappings are gone, or will be reported again.

        To be called within the running event loop.
        """
        self._end(set(self._table.pinned()) - self._wanted)

    def want(self, slot: int, wanted: bool) -> None:
        """Pin a slot; or unpin it, as soon as no change of its file is under way."""
        if wanted and slot not in self._wanted:
            self._wanted.add(slot)
            self._ending.discard(slot)
            self._table.pin(slot)
        elif not wanted and slot in self._wanted:
            self._wanted.remove(slot)
            self._end({slot})

    def _end(self, slots: set[int]) -> None:
        idle = not self._ending
        self._ending |= slots
        if idle:
            self._look()

    def _look(self) -> None:
        self._ending = {slot for slot in self._ending if not self._leases.unpin(slot)}
        if self._ending:
            asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._look)
