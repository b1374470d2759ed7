"""The events of an inotify instance, and the short way from a write to its bump."""

from collections.abc import Callable, Container

from coherent_vfs.coherence.daemon.watch.invalidator import Domain
from coherent_vfs.coherence.daemon.watch.watched_tree import Watched

class Event:
    """An event, or several equal ones; see inotify(7)."""

    @property
    def wd(self) -> int:
        """Watch descriptor."""

    @property
    def mask(self) -> int:
        """What has happened."""

    @property
    def cookie(self) -> int:
        """The same for the two events of a rename."""

    @property
    def name(self) -> bytes:
        """In the directory; empty where the event is of the watched inode itself."""

    @property
    def positions(self) -> list[int]:
        """Where they were in the queue, counted from 1, ascending."""

class Queue:
    """Reads the queue.

    A write to a file is bumped while the event is read, where no backend can have had a hand in it. An event of which
    that cannot be said is for others to judge, and so are all that come after it: changes of the host are bumped in
    the order in which they were made.

    Args:
        fd: the inotify instance, nonblocking.
        domain: to bump in.
        watched: by watch descriptor.
        backend_ids: numbers of the backends whose changes are told apart.
        tell: called for each write that was bumped, after that, while somebody wants to know of changes.
        left: called by serve() where events are left.
    """

    def __init__(
        self,
        fd: int,
        domain: Domain,
        watched: dict[int, Watched],
        backend_ids: Container[int],
        tell: Callable[[Watched, bytes], None],
        left: Callable[[], None],
    ) -> None: ...
    @property
    def position(self) -> int:
        """That of the event that was read last."""

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
