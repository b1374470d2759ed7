"""Who belongs to the domain, and whether the table may be trusted: the rules, without sockets.

The floor protocol (docs/coherenced.md): the table is trusted only while every living backend that has a
journal is a member of the running daemon. A backend that dies has what it announced bumped; one that lives
but is not connected makes everybody ask until it is back or dead.
"""

from __future__ import annotations

from collections.abc import Callable

from coherence import holder, journals
from coherence.errors import UserError
from coherence.leases import Leases
from coherence.log import get_logger
from coherence.places import Places
from coherence.table import TRUST_NOTHING, Table

log = get_logger(__name__)

# Below HOLDER_MAX, so that the number of a dead one, whose leases may run on, is not given out again at once.
MAX_BACKENDS = 1000


class Registry:
    """The journals of one table and their holders.

    Args:
        table: mapped writable.
        leases: of the same table.
        places: of the same table.
    """

    def __init__(self, table: Table, leases: Leases, places: Places) -> None:
        self.table = table
        self.leases = leases
        self.places = places
        # By key: the backend's number in the lease table.
        self.holders: dict[int, int] = {}
        # By key: how many roots the table had when the backend became a member.
        self.members: dict[int, int] = {}
        self.missing: set[int] = set()
        self.trusted = False
        # Whether a member has yet to tell what its guest has mapped: which slots are pinned depends on it.
        self.untold: Callable[[], bool] = lambda: False
        self.floor_raises = 0
        self.distrusts = 0

    def recover(self) -> None:
        """Start over with what an earlier daemon left, or with nothing: bury the dead, await the living."""
        self._distrust()
        for key in self.places.journal_keys():
            journal = journals.read(self.places.journal(key))
            if journal is not None and journal.domain != self.table.domain:
                # Of a table that is gone: its backend, if it lives, will be told so when it comes.
                journals.remove(self.places, key)
                continue
            if journal is not None:
                self.holders[key] = journal.holder
            if holder.holder(key) is None:
                self._bury(key, 0)
            else:
                self.missing.add(key)
        if self.missing:
            log.info("waiting for backends to come back", pids=self.missing_pids())
        self._settle()

    def grant(self, pid: int, uid: int, root: tuple[int, int], held: int | None) -> int:
        """The journal for a backend that joins, its own if it holds one; its root is in the table then.

        Args:
            pid, uid: of the backend, from the kernel.
            root: st_dev and st_ino of its share's root.
            held: the key of the journal that it says it holds.

        Returns:
            The journal's key. UserError when the table has no room for the root, there are MAX_BACKENDS, or no
            journal can be made.
        """
        self.table.add_root(self.table.inode_slot(*root))
        if held is not None and held in self.missing and holder.holder(held) == pid:
            return held
        # Clients are bounded, but one that takes a semaphore and goes, again and again, leaves a journal each time.
        if len(self.members) + len(self.missing) >= MAX_BACKENDS:
            raise UserError(f"there are {MAX_BACKENDS} backends already: end one, or use another table")
        number = self.leases.next_holder(self.holders.values())
        key = journals.create(self.places, self.table.domain, uid, number)
        self.holders[key] = number
        return key

    def register(self, key: int, pid: int, window: bool = False) -> None:
        """Make the backend a member.

        Args:
            key: of its journal.
            pid: of the backend.
            window: whether it will tell of a DAX window: the table is not trusted again before that.

        Raises:
            UserError: it does not hold the journal's semaphore.
        """
        if holder.holder(key) != pid:
            raise UserError("the journal's semaphore is not held by this backend: report this as a bug")
        self.missing.discard(key)
        self.members[key] = len(self.table.roots)
        if not window:
            self._settle()

    def leave(self, key: int) -> None:
        """The connection of the journal's backend is over: it died, or it will have to come back."""
        roots = self.members.pop(key, len(self.table.roots))
        if holder.holder(key) is None:
            self._bury(key, roots)
        else:
            self.missing.add(key)
            self._distrust()

    def sweep(self) -> None:
        """See whether a missing backend has died meanwhile, and end a distrust that nobody else will end."""
        for key in [key for key in self.missing if holder.holder(key) is None]:
            self.missing.discard(key)
            self._bury(key, 0)
        self._settle()
        if self.trusted and self.table.floor == TRUST_NOTHING:
            # Of a backend that took this daemon for gone and died before it came back.
            self.raise_floor()

    def missing_pids(self) -> list[int]:
        """The processes that are waited for."""
        return sorted(pid for key in self.missing if (pid := holder.holder(key)) is not None)

    def close(self) -> None:
        """The daemon ends: nobody watches over the table, so nobody may trust it."""
        self._distrust()

    def _bury(self, key: int, roots: int) -> None:
        journal = journals.read(self.places.journal(key))
        announced = None if journal is None else journal.announced
        number = self.holders.pop(key, 0)
        if announced and len(self.table.roots) > roots:
            # A directory that has become a root meanwhile has its names under slot 1 as well; it did not know.
            self.raise_floor()
        if announced is None:
            log.warning("a dead backend may have changed anything", journal=f"{key:08x}")
            self.raise_floor()
        # What a backend wrote is not trusted: any number names some slot.
        slots = [slot & (self.table.slot_count - 1) for slot in announced or ()]
        for slot in slots:
            self.leases.changed(slot, data=True)
            self.table.bump(slot)
            if self.table.is_root(slot):
                self.table.bump(1)
        # After all bumps: slots share their locks, and an open one lets leases be given.
        self.leases.release(number)
        journals.remove(self.places, key)
        log.info("backend buried", journal=f"{key:08x}", announced=len(announced or ()))

    def _distrust(self) -> None:
        self.table.distrust()
        self.trusted = False
        self.distrusts += 1

    def _settle(self) -> None:
        if not (self.trusted or self.missing or self.untold()):
            self.trusted = True
            self.raise_floor()
            log.info("the table is trusted", sequence=self.table.sequence)

    def raise_floor(self) -> None:
        """Make everything that is cached invalid."""
        # While the table is distrusted the floor cannot be higher, and _settle will set it anew.
        if self.trusted:
            self.table.raise_floor()
            self.floor_raises += 1
