"""Who belongs to the domain, and whether the table may be trusted: the rules, without sockets.

The floor protocol (docs/concepts/failures.md): the table is trusted only while every living backend that has a
journal is a member of the running daemon. A backend that dies has what it announced bumped; one that lives
but is not connected makes everybody ask until it is back or dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon import journals
from coherent_vfs.coherence.protocol.messages import FloorReason
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import ROOT_BITS, TRUST_NOTHING, Table

log = get_logger(__name__)

# Below BACKEND_MAX, so that the number of a dead one, whose leases may run on, is not given out again at once.
MAX_BACKENDS = 1000
# Roots that no member has any more: one root in 64 bits of the table makes one change in 64 bump slot 1 needlessly.
MAX_LEFT_ROOTS = ROOT_BITS // 64


@dataclass(frozen=True, slots=True)
class Member:
    """A backend that is a member.

    Args:
        root: the inode slot of its share's root.
        root_epoch: of the table when it became one.
    """

    root: int
    root_epoch: int


class Registry:
    """The journals of one table and the backends that have them.

    Args:
        table: mapped writable.
        leases: of the same table.
        paths: of the same table.
    """

    def __init__(self, table: Table, leases: Leases, paths: DomainPaths) -> None:
        self.table = table
        self.leases = leases
        self.paths = paths
        # By key: the backend's number in the lease table.
        self.backend_ids: dict[int, int] = {}
        # By key.
        self.members: dict[int, Member] = {}
        self.missing: set[int] = set()
        # Of a table that was removed: their backends live and never come back.
        self.outside: set[int] = set()
        self.trusted = False
        # Whether a member has yet to tell what its guest has mapped: which slots are pinned depends on it.
        self.unreported: Callable[[], bool] = lambda: False
        self.floor_raises: dict[FloorReason, int] = dict.fromkeys(get_args(FloorReason), 0)
        self.distrusts = 0

    def recover(self) -> None:
        """Start over with what an earlier daemon left, or with nothing: reap the dead, await the living."""
        self._distrust()
        for key in self.paths.journal_keys():
            journal = journals.read(self.paths.journal(key))
            if journal is not None and journal.domain != self.table.domain:
                self.outside.add(key)
                continue
            if journal is not None:
                self.backend_ids[key] = journal.backend_id
            if liveness.owner(key) is None:
                self._reap(key)
            else:
                self.missing.add(key)
        self._forget_outside()
        if self.missing:
            log.info("waiting for backends to come back", pids=self.missing_pids())
        if self.outside:
            log.warning(
                "backends serve their guests with a table that was removed: restart these virtual machines",
                pids=self.outside_pids(),
            )
        self._settle()

    @property
    def roots(self) -> set[int]:
        """The inode slots of the roots of members' shares."""
        return {member.root for member in self.members.values()}

    def grant(self, pid: int, uid: int, held: int | None) -> int:
        """The journal for a backend that joins, its own if it holds one.

        Args:
            pid, uid: of the backend, from the kernel.
            held: the key of the journal that it says it holds.

        Returns:
            The journal's key. UserError when there are MAX_BACKENDS, or no journal can be made.
        """
        if held is not None and held in self.missing and liveness.owner(held) == pid:
            return held
        # Clients are bounded, but one that takes a semaphore and goes, again and again, leaves a journal each time.
        if len(self.members) + len(self.missing) >= MAX_BACKENDS:
            raise UserError(f"there are {MAX_BACKENDS} backends already: end one, or use another table")
        number = self.leases.next_backend(self.backend_ids.values())
        key = journals.create(self.paths, self.table.domain, uid, number)
        self.backend_ids[key] = number
        return key

    def register(self, key: int, pid: int, root: tuple[int, int], window: bool = False) -> None:
        """Make the backend a member; its root is in the table then.

        Args:
            key: of its journal.
            pid: of the backend.
            root: st_dev and st_ino of its share's root.
            window: whether it will tell of a DAX window: the table is not trusted again before that.

        Raises:
            UserError: it does not hold the journal's semaphore.
        """
        if liveness.owner(key) != pid:
            raise UserError("the journal's semaphore is not held by this backend: report this as a bug")
        self.missing.discard(key)
        slot = self.table.inode_slot(*root)
        self.table.add_root(slot)
        self.members[key] = Member(slot, self.table.root_epoch)
        if not window:
            self._settle()

    def leave(self, key: int) -> None:
        """The connection of the journal's backend is over: it died, or it will have to come back."""
        member = self.members.pop(key, None)
        if liveness.owner(key) is None:
            self._reap(key, member)
            if len(self.table.root_bits) > len(self.roots) + MAX_LEFT_ROOTS:
                self.raise_floor("shares")
        else:
            self.missing.add(key)
            self._distrust()

    def sweep(self) -> None:
        """See whether a missing backend has died meanwhile, and end a distrust that nobody else will end."""
        self._forget_outside()
        for key in [key for key in self.missing if liveness.owner(key) is None]:
            self.missing.discard(key)
            self._reap(key)
        self._settle()
        if self.trusted and self.table.floor == TRUST_NOTHING:
            # Of a backend that took this daemon for gone and died before it came back.
            self.raise_floor("trusted")

    def missing_pids(self) -> list[int]:
        """The processes that are waited for."""
        return _holders(self.missing)

    def outside_pids(self) -> list[int]:
        """The processes of backends that serve their guests with a table that was removed."""
        return _holders(self.outside)

    def close(self) -> None:
        """The daemon ends: nobody watches over the table, so nobody may trust it."""
        self._distrust()

    def _forget_outside(self) -> None:
        for key in [key for key in self.outside if liveness.owner(key) is None]:
            self.outside.discard(key)
            journals.remove(self.paths, key)

    def _reap(self, key: int, member: Member | None = None) -> None:
        journal = journals.read(self.paths.journal(key))
        announced = None if journal is None else journal.announced
        number = self.backend_ids.pop(key, 0)
        if announced and (member is None or self.table.root_epoch != member.root_epoch):
            # A directory that has become a root meanwhile has its names under slot 1 as well; it did not know.
            self.raise_floor("death")
        if announced is None:
            log.warning("a dead backend may have changed anything", journal=f"{key:08x}")
            self.raise_floor("death")
        # What a backend wrote is not trusted: any number names some slot.
        slots = [slot & (self.table.slot_count - 1) for slot in announced or ()]
        for slot in slots:
            self.leases.changed(slot, data=True)
            self.table.bump(slot)
            if self.table.is_root(slot):
                self.table.bump(1)
        # After all bumps: slots share their locks, and an open one lets leases be given.
        self.leases.release(number)
        journals.remove(self.paths, key)
        log.info("backend buried", journal=f"{key:08x}", announced=len(announced or ()))

    def _distrust(self) -> None:
        self.table.distrust()
        self.trusted = False
        self.distrusts += 1

    def _settle(self) -> None:
        if not (self.trusted or self.missing or self.unreported()):
            self.trusted = True
            self.raise_floor("trusted")
            log.info("the table is trusted", sequence=self.table.sequence)

    def raise_floor(self, reason: FloorReason) -> None:
        """Make everything that is cached invalid."""
        # While the table is distrusted the floor cannot be higher, and _settle will set it anew.
        if self.trusted:
            self.table.raise_floor()
            self.floor_raises[reason] += 1
            # Each living backend is a member now. A guest may outlive its own and go on checking slot 1, but nothing
            # that it has is good after this, and it can fetch nothing.
            self.table.keep_roots(self.roots)


def _holders(keys: Iterable[int]) -> list[int]:
    return sorted(pid for key in keys if (pid := liveness.owner(key)) is not None)
