"""Types of lease_loop.pyx. Times are CLOCK_MONOTONIC, microseconds."""

from coherent_vfs.coherence.shm.leases import Leases

def grant(leases: Leases, hash: int, me: int, iterations: int) -> int:
    """Stamp and give a lease, each a little longer, so many times; returns how many were given."""

def lock(leases: Leases, hash: int, me: int, iterations: int) -> int:
    """Lock, look for leases of others and unlock, with one look at the clock; returns how often that went well."""

def use(leases: Leases, shared: memoryview, hash: int, me: int, second_look: bool, meetings: int) -> tuple[int, bool]:
    """Fetch the value in shared memory and use it for a lease's time, again and again, until an older value
    than the last acknowledged is used; change() ends when this does.

    Args:
        leases: the lease table.
        shared: four 64-bit words, 0 at first: the value, the last one acknowledged, how often change() met a lease,
            and whether this has ended.
        hash: of the thing whose value it is.
        me: the holder.
        second_look: False leaves out the look for a lock, a close, and a bump after the lease is written.
        meetings: how often change() meets a lease, when this ends in any case.

    Returns:
        How many leases there were, and whether an older value was used.
    """

def change(leases: Leases, shared: memoryview, hash: int, me: int, wait: bool) -> int:
    """Change the value in shared memory, as docs/concepts/leases.md says, until use() has ended.

    Args:
        leases, shared, hash: those of use().
        me: another holder.
        wait: False makes a change at once, whatever leases there are.

    Returns:
        How many changes there were.
    """

def now() -> int:
    """The time."""

def grant_at(leases: Leases, hash: int, me: int, stamp: int, now: int, until: int) -> int:
    """Give a lease until then; whether that may be."""

def leased_until_at(leases: Leases, hash: int, me: int, now: int) -> int:
    """When the last lease of others ends; 0: there is none."""

def lock_at(leases: Leases, hash: int, me: int, now: int) -> tuple[int, int]:
    """Lock the bucket of a hash: the word to unlock it with, 0 where another holds it, and the word before."""

def unlock(leases: Leases, hash: int, mine: int, next: int) -> bool:
    """Unlock the bucket of a hash, leaving the word next; whether it was locked until now."""

def quiet_for(leases: Leases, hash: int, now: int) -> int:
    """Microseconds since the last change of anything in the bucket."""

def set_origin(leases: Leases, slot: int, me: int, number: int) -> None:
    """Who changes the slot, by the how manieth of its changes. IndexError for a slot that is not in the table."""

def data_since(leases: Leases, slot: int, stamp: int) -> bool:
    """Whether data in the slot's bucket changed since what was told with this stamp. IndexError likewise."""
