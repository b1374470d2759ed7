"""The lease table, as the host watch sees it."""

from __future__ import annotations

from typing import Protocol


class LeaseTable(Protocol):
    """What the host watch needs of coherence.shm.leases.Leases."""

    def origin(self, slot: int) -> tuple[int, int] | None:
        """Holder and number of the last change of a slot, None where they are not known."""

    def locked(self, slot: int) -> bool:
        """Whether a backend is changing something in the slot's bucket now."""

    def changed(self, slot: int, data: bool) -> None:
        """Note a change on the host, before the bump."""

    def end_watch_epoch(self) -> None:
        """Void what backends remember as being watched."""

    def want_markers(self, wanted: bool) -> None:
        """Have backends write the number of each change into their journals, or not."""
