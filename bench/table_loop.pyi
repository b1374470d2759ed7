"""Types of table_loop.pyx."""

from coherent_vfs.coherence.shm.table import Table

def bump(table: Table, slot: int, iterations: int) -> int:
    """Bump the slot so many times; returns the last sequence. PermissionError on a read-only table."""

def check(table: Table, slot: int, iterations: int) -> int:
    """Stamp once and check so many slots from this one on; returns how many were good."""

def hammer(table: Table, slots: int, iterations: int) -> int:
    """Bump slot 0 to `slots` - 1 in turn, looking at each afterwards.

    Returns:
        How often a slot was lower than the bump before it: a lost bump.
    """
