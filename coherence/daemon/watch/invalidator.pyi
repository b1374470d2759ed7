"""What a host watch tells the domain: bumps, voided marks, a raised floor; and what it counts while it does."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from coherent_vfs.coherence.daemon.watch.lease_table import LeaseTable
from coherent_vfs.coherence.protocol.messages import FloorReason
from coherent_vfs.coherence.shm.table import Table

What = Literal["create", "delete", "modify", "attrib", "move from", "move to"]
OnChange = Callable[[str, What, bytes], None]
OnData = Callable[[int], None]
RaiseFloor = Callable[[FloorReason], None]

HOST: str
"""Who is told to have made a change that no backend made."""

class Counts:
    """Since the daemon started: changes seen, which were bumped, the backends' own, or of what is gone; and trouble."""

    events: int
    bumped: int
    own: int
    gone: int
    overflows: int
    refused: int

class Domain:
    """The tables of one domain, as a host watch acts on them.

    Args:
        table: mapped writable.
        leases: of the same table.
        raise_floor: makes everything that is cached invalid, for a reason.

    Attributes:
        counts: what the status shows.
        on_data: called for each inode slot that is bumped because data has changed, after that.
        on_change: called for each change with who made it ("host" or a guest), what it was, and the path; None
            while nobody wants to know. Changes of one kind to one name in quick succession are told once.
    """

    table: Table
    leases: LeaseTable
    raise_floor: RaiseFloor
    counts: Counts
    on_data: OnData
    on_change: OnChange | None

    def __init__(self, table: Table, leases: LeaseTable, raise_floor: RaiseFloor) -> None: ...
    def bump(self, names: Iterable[tuple[int, bytes]], inodes: Mapping[int, bool]) -> None:
        """Bump names, then inodes.

        Args:
            names: pairs of a directory's inode slot and a name in it.
            inodes: inode slots, with whether a file's data or a directory's list has changed.
        """

    def end_watch_epoch(self, reason: FloorReason) -> None:
        """Something that was watched may not be any more: nothing cached counts, and all is to be watched anew."""
