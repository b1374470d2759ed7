"""Slots of files that a guest has mapped to store into: nobody relies on what a file was, as stores bump nothing."""

from __future__ import annotations

import asyncio
from typing import Protocol

AGAIN_SECONDS = 0.002


class Table(Protocol):
    """What it needs of coherence.shm.table.Table."""

    def pin(self, slot: int) -> None:
        """Make what depends on a slot never good."""

    def pinned(self) -> list[int]:
        """The slots that are pinned."""


class Leases(Protocol):
    """What it needs of coherence.shm.leases.Leases."""

    def unpin(self, slot: int) -> bool:
        """End that; false where it has to be tried again."""


class WriteMappings:
    """Keeps the right slots pinned.

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
        """Within the running event loop: what an earlier daemon has pinned is mapped no more, or will be told anew."""
        self._end(set(self._table.pinned()) - self._wanted)

    def want(self, slot: int, wanted: bool) -> None:
        """Pin a slot, or end that as soon as nobody is changing what it stands for."""
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
