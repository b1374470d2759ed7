"""Which changes are the backends' own, and so are bumped by them: the proof by markers.

inotify reports what backends do for their guests, too. Before its bumps a backend notes in the lease table for
each slot of a change its *origin*, (holder, number); then it writes the number into its journal, which is watched
in the same inotify queue. That event is the change's *marker*: it comes after the events of the change and before
its bumps. So an event on a slot whose origin is (b, k) needs no bump if k's marker came after it: k's bump of the
slot is then later than what the event tells, whoever made that.

Markers carry no number. But all of b's markers are of changes that are numbered at most K, the count in b's journal
read after the events. Were k's marker before the event, the markers after it would be of changes k + 1 to K: K - k
at most. So more of them than that prove that k's marker came after it. (inotify merges equal events that follow each
other, so there may be fewer markers than changes; then the proof fails, and a needless bump does no harm.)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, field

from coherence.errors import UserError
from coherence.table import JOURNAL_BYTES, parse_journal
from coherence.watch.domain import LeaseTable


@dataclass(slots=True, eq=False)
class Member:
    """A backend whose changes are told apart.

    Args:
        holder: its number in the lease table.
        guest: what people call its guest.
        journal: a descriptor of its journal.
        markers: positions of its markers in the queue, ascending.
    """

    holder: int
    guest: str
    journal: int
    markers: list[int] = field(default_factory=list)


class OwnChanges:
    """Finds out whether a backend bumps a slot after an event."""

    def __init__(self, leases: LeaseTable) -> None:
        self._leases = leases
        self._members: dict[int, Member] = {}
        self._counts: dict[int, int] = {}

    def add(self, member: Member) -> None:
        """Tell this backend's changes apart from now on."""
        self._members[member.holder] = member

    def remove(self, member: Member) -> None:
        """The backend is gone."""
        if self._members.get(member.holder) is member:
            del self._members[member.holder]

    def read_anew(self) -> None:
        """Call after reading events and before asking about them: counts are never older than the events."""
        self._counts.clear()

    def changer(self, slot: int, position: int) -> Member | None:
        """The backend that surely bumps the slot after the event at this position of the queue, if there is one."""
        origin = self._leases.origin(slot)
        if origin is None:
            return None
        holder, number = origin
        member = self._members.get(holder)
        if member is None:
            return None
        count = self._count(member)
        after = len(member.markers) - bisect_right(member.markers, position)
        return member if number <= count and after > count - number else None

    def forget_markers(self, position: int) -> None:
        """No event before this position will be asked about."""
        for member in self._members.values():
            del member.markers[: bisect_right(member.markers, position)]

    def _count(self, member: Member) -> int:
        count = self._counts.get(member.holder)
        if count is None:
            try:
                count = parse_journal(os.pread(member.journal, JOURNAL_BYTES, 0)).changes
            except UserError:
                # Its backend has spoilt it: nothing is proved.
                count = -1
            self._counts[member.holder] = count
        return count
