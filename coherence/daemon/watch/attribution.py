"""Which changes are the backends' own, and so are bumped by them: the proof by markers.

inotify reports what backends do for their guests, too. Before its bumps a backend notes in the lease table for
each slot of a change its *origin*, (backend_id, number); then it writes the number into its journal, which is watched
in the same inotify queue. That event is the change's *marker*: it comes after the events of the change and before
its bumps. So an event on a slot whose origin is (b, k) needs no bump if k's marker comes after it: k's bump of the
slot is then later than what the event tells, whoever made that.

Markers carry no number, and inotify merges equal events that follow each other, so there may be fewer markers than
changes. But when K is the count in b's journal, read after some events, no marker among these is of a change beyond
K, and markers are numbered in ascending order. Let t of the n markers of b that have been read come before the event:
n - t come after it, all of different changes up to K; so the last one before it is of change K - (n - t) at most. If
that is less than k, then k's marker comes after the event. Where the proof fails, as some were merged or K was read
too late, a needless bump does no harm. Nor do changes without a marker, made while nothing was watched: they make K
larger, never n.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import KeysView
from dataclasses import dataclass, field

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon.watch.lease_table import LeaseTable
from coherent_vfs.coherence.shm.table import JOURNAL_BYTES, parse_journal

UNKNOWN = 1 << 64


@dataclass(slots=True, eq=False)
class Member:
    """A backend whose changes are told apart.

    Args:
        backend_id: its number in the lease table.
        guest: what people call its guest.
        journal: a descriptor of its journal.
        markers: positions in the queue of its markers, ascending; the first ones may be forgotten.
        forgotten: how many of them are.
        offsets: for batches of events, ascending: its count after the batch less the number of its markers until then.
        count: its count, as read last.
    """

    backend_id: int
    guest: str
    journal: int
    markers: list[int] = field(default_factory=list)
    forgotten: int = 0
    offsets: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    def read_count(self, batch: int) -> int:
        """Read its count after a batch of events; returns the offset."""
        try:
            self.count = parse_journal(os.pread(self.journal, JOURNAL_BYTES, 0)).changes
        except UserError:
            # Its backend has spoilt it: nothing is proved.
            self.count = UNKNOWN
        self.offsets.append((batch, self.count - self.forgotten - len(self.markers)))
        return self.offsets[-1][1]

    def offset(self, since: int, now: int) -> int:
        """The least offset after a batch or a later one; `now` is the last batch that has been read."""
        known = [offset for batch, offset in self.offsets if batch >= since]
        return min(known) if known else self.read_count(now)

    def markers_before(self, position: int) -> int:
        """How many of its markers come before an event."""
        return self.forgotten + bisect_right(self.markers, position)

    def forget(self, position: int, batch: int) -> None:
        """No event before this position and batch will be asked about."""
        count = bisect_right(self.markers, position)
        del self.markers[:count]
        self.forgotten += count
        self.offsets = [pair for pair in self.offsets if pair[0] >= batch]


class Attribution:
    """Finds out whether a backend bumps a slot after an event."""

    def __init__(self, leases: LeaseTable) -> None:
        self._leases = leases
        self._members: dict[int, Member] = {}
        self._marked: set[Member] = set()
        self._batch = 0

    @property
    def backend_ids(self) -> KeysView[int]:
        """Numbers of the backends that are here; always as they are now."""
        return self._members.keys()

    def add(self, member: Member) -> None:
        """Tell this backend's changes apart from now on."""
        self._members[member.backend_id] = member

    def remove(self, member: Member) -> None:
        """The backend is gone."""
        self._marked.discard(member)
        if self._members.get(member.backend_id) is member:
            del self._members[member.backend_id]

    def mark(self, member: Member, positions: list[int]) -> None:
        """Markers of the backend have been read."""
        member.markers.extend(positions)
        self._marked.add(member)

    def end_batch(self, batch: int) -> None:
        """All events of a batch have been read."""
        self._batch = batch
        for member in self._marked:
            member.read_count(batch)
        self._marked.clear()

    def may_be_own(self, slot: int) -> bool:
        """Whether the last change of the slot that is known was made by a backend that is here."""
        origin = self._leases.origin(slot)
        return origin is not None and origin[0] in self._members

    def changer(self, slot: int, position: int, batch: int) -> Member | None:
        """The backend that surely bumps the slot after an event, if there is one.

        Args:
            slot: that the event is about.
            position: of the event in the queue.
            batch: with which it was read.
        """
        origin = self._leases.origin(slot)
        if origin is None:
            return None
        backend_id, number = origin
        member = self._members.get(backend_id)
        if member is None:
            return None
        offset = member.offset(batch, self._batch)
        if number > member.count:
            member.read_count(self._batch)
        # An origin beyond its count is that of a backend that had its number before.
        return member if member.markers_before(position) + offset < number <= member.count else None

    def forget(self, position: int, batch: int) -> None:
        """No event before this position and batch will be asked about."""
        for member in self._members.values():
            member.forget(position, batch)
