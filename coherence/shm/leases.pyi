"""The lease table: who may rely on what until when, and who is changing what (docs/concepts/leases.md)."""

from collections.abc import Container

from coherent_vfs.coherence.shm.table import Table

BACKEND_MAX: int
"""Holders are numbered from 1 to this."""

def lease_table_bytes(slot_count: int) -> int:
    """The size of the lease table of a version table with so many slots."""

def clock_offset(path: str = ...) -> int:
    """What the time namespace of this process adds to CLOCK_MONOTONIC, nanoseconds (time_namespaces(7)).

    Args:
        path: of the file that says so; 0 where there is none.
    """

class Leases:
    """A mapped lease table, always writable. Slots and hashes are those of its version table."""

    table: Table

    @staticmethod
    def create(name: str, table: Table) -> Leases:
        """Make the lease table of a version table in shared memory. UserError when that cannot be done."""

    @staticmethod
    def from_fd(fd: int, table: Table) -> Leases:
        """Map the lease table of a version table; the caller goes on owning fd.

        Raises:
            UserError: it is another's.
            OtherClock: its times are of another clock than this process's.
        """

    def move(self, fd: int) -> None:
        """Go on with another lease table of the same version table; raises as from_fd."""

    def close(self) -> None:
        """Unmap. Compiled code that still uses `lt` would touch unmapped memory."""

    def next_backend(self, used: Container[int]) -> int:
        """A number for a new backend, one that was not in use for as long as possible: leases of a dead one run on.

        Only coherenced calls it. UserError when all are in use.
        """

    @property
    def epoch(self) -> int:
        """The epoch of the host watch: what was found to be watched in an older one may not be any more."""

    def end_watch_epoch(self) -> None:
        """Begin a new epoch: something that was watched by its directory has left it."""

    @property
    def markers_wanted(self) -> bool:
        """Whether backends write the number of each change into their journals, for the host watch to see."""

    def want_markers(self, wanted: bool) -> None:
        """Have them do so, or not. Only coherenced calls it."""

    def origin(self, slot: int) -> tuple[int, int] | None:
        """Which backend made the last change to a slot, and the how manieth of its changes that was.

        None where that is not known, as another slot of the bucket was changed since.
        """

    def locked(self, slot: int) -> bool:
        """Whether a backend is changing something in the slot's bucket now."""

    def changed(self, slot: int, data: bool) -> None:
        """Note a change on the host, before the bump; data: of a file's data or a directory's list."""

    def unpin(self, slot: int) -> bool:
        """End Table.pin; false while somebody is changing something in the slot's bucket: then try again."""

    def release(self, backend_id: int) -> None:
        """Unlock all that a dead backend had locked; after the bumps."""

    def leased_until(self, hash: int, backend_id: int) -> int:
        """When the last lease of another backend ends (CLOCK_MONOTONIC, microseconds), 0: there is none."""

    def grant(self, hash: int, backend_id: int, stamp: int, microseconds: int) -> bool:
        """Give a lease of so many microseconds on what was fetched after the stamp was taken; whether that may be."""

    def lock(self, slot: int, backend_id: int) -> int:
        """Lock a slot's bucket; 0 where another holds the lock."""

    def close_until(self, slot: int, microseconds: int) -> None:
        """Give no new leases in the slot's bucket for so long."""
