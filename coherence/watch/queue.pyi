"""The events of an inotify instance, and the short way from a write to its bump."""

from collections.abc import Callable, Container

from coherence.watch.domain import Domain
from coherence.watch.tree import Watched

class Event:
    """An event, or several equal ones; see inotify(7).

    Attributes:
        wd: watch descriptor.
        mask: what has happened.
        cookie: the same for the two events of a rename.
        name: in the directory; empty where the event is of the watched inode itself.
        positions: where they were in the queue, counted from 1, ascending.
    """

    wd: int
    mask: int
    cookie: int
    name: bytes
    positions: list[int]

class Queue:
    """Reads the queue.

    A write to a file is bumped while the event is read, where no backend can have had a hand in it. An event of which
    that cannot be said is for others to judge, and so are all that come after it: changes of the host are bumped in
    the order in which they were made.

    Args:
        fd: the inotify instance, nonblocking.
        domain: to bump in.
        watched: by watch descriptor.
        holders: numbers of the backends whose changes are told apart.
        tell: called for each write that was bumped, after that, while somebody wants to know of changes.
        left: called by serve() where events are left.

    Attributes:
        position: of the event that was read last.
    """

    position: int

    def __init__(
        self,
        fd: int,
        domain: Domain,
        watched: dict[int, Watched],
        holders: Container[int],
        tell: Callable[[Watched, bytes], None],
        left: Callable[[], None],
    ) -> None: ...
    def serve(self) -> None:
        """Read once, as soon as the descriptor is readable. What is left is kept for read()."""

    def read(self, bumps: bool) -> list[Event]:
        """Read all events that there are.

        Args:
            bumps: whether writes may be bumped at once: nothing that was read before waits to be judged.

        Returns:
            Those that are left to be judged, in the order in which the first of equal ones came. A busy guest
            writes to the same file again and again: to judge that once is enough.
        """
