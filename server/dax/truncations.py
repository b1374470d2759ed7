"""Files that this guest makes smaller: others first give up what they have mapped beyond the new end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Allocator(Protocol):
    """The client of coherenced's allocator (coherence.client.dax)."""

    @property
    def coordinates(self) -> bool:
        """Whether others may have mapped something."""
        ...

    def shrink(self, fd: int, size: int, done: Callable[[], None]) -> int:
        """Ask others to give up what is beyond a size; done() when they have. Returns a token."""
        ...

    def shrunk(self, token: int) -> None:
        """The file has its new size, or keeps the old one."""
        ...

    def is_granted(self, token: int) -> bool:
        """Whether what was granted is so still."""
        ...

    @property
    def has_news(self) -> bool:
        """Whether it was told something that it has not looked at."""
        ...


class Files(Protocol):
    """The files of the guest (server.session.file_system.FileSystem)."""

    def reopen(self, nodeid: int, flags: int) -> int:
        """A new descriptor of an inode."""
        ...

    def wake(self) -> None:
        """Look at parked requests again."""
        ...


@dataclass(slots=True)
class Truncation:
    """One that is under way.

    Attributes:
        fd: of the file.
        nodeid, size: what for.
        token: of the allocator.
        granted: whether it was granted, which does not last (Allocator.is_granted).
    """

    fd: int
    nodeid: int
    size: int
    token: int = 0
    granted: bool = False


class Truncations:
    """The truncations of a guest's requests, by their number.

    Args:
        allocator: who knows the others.
        files: whose files.
    """

    def __init__(self, allocator: Allocator, files: Files) -> None:
        self._allocator = allocator
        self._files = files
        self._under_way: dict[int, Truncation] = {}

    def is_new(self, unique: int) -> bool:
        """Whether this request would be the first to ask others."""
        return self._allocator.coordinates and unique not in self._under_way

    def begin(self, unique: int, nodeid: int, size: int) -> bool:
        """Whether a request may make a file smaller now; if not, it is to ask again when it is woken.

        Args:
            unique: of the request.
            nodeid: the file, a regular one.
            size: that it will have, bytes.

        Raises:
            OSError: it cannot be opened for writing, so that others cannot be asked.
        """
        under_way = self._under_way.get(unique)
        if under_way is not None:
            lapsed = under_way.granted and not self._allocator.is_granted(under_way.token)
            if under_way.nodeid == nodeid and under_way.size <= size and not lapsed:
                return under_way.granted
            # It waited for too long, for leases or as this process was stopped; or a file has changed meanwhile, or
            # a guest is up to no good.
            self.end(unique)
        if not self._allocator.coordinates:
            return True
        fd = self._files.reopen(nodeid, os.O_WRONLY)
        if os.fstat(fd).st_size <= size:
            os.close(fd)
            return True
        truncation = self._under_way[unique] = Truncation(fd, nodeid, size)

        def granted() -> None:
            truncation.granted = True
            self._files.wake()

        truncation.token = self._allocator.shrink(fd, size, granted)
        return truncation.granted

    def is_current(self, unique: int) -> bool:
        """Whether what begin said is so still; to be asked right before the change, after whatever may take time.

        If not, the request is to begin again after the next turn of the event loop.
        """
        if self._allocator.has_news:
            # The grant may be over, or the first other window has come.
            return False
        under_way = self._under_way.get(unique)
        return under_way is None or self._allocator.is_granted(under_way.token)

    def end(self, unique: int) -> None:
        """The request has made its change, or will not; one that made none smaller may say so, too."""
        truncation = self._under_way.pop(unique, None)
        if truncation is not None:
            self._allocator.shrunk(truncation.token)
            os.close(truncation.fd)

    def clear(self) -> None:
        """The session is over, and nobody will serve its requests."""
        for unique in list(self._under_way):
            self.end(unique)
