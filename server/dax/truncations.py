"""Truncations by this guest: before one, others' mappings beyond the new end are revoked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Allocator(Protocol):
    """The client of coherenced's allocator (coherence.client.dax)."""

    @property
    def coordinates(self) -> bool:
        """Whether others may have mappings."""
        ...

    def truncate(self, fd: int, size: int, done: Callable[[], None]) -> int:
        """Have others' mappings beyond a size revoked, then call done(). Returns a token."""
        ...

    def truncated(self, token: int) -> None:
        """A truncation is over: the file has its new size, or keeps the old one."""
        ...

    def is_granted(self, token: int) -> bool:
        """Whether a grant is still valid."""
        ...

    @property
    def has_news(self) -> bool:
        """Whether there are unread messages of coherenced."""
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
    """A truncation that is under way.

    Attributes:
        fd: of the file.
        nodeid, size: the file, and its new size in bytes.
        token: of the allocator.
        granted: whether it was granted. A grant expires (Allocator.is_granted).
    """

    fd: int
    nodeid: int
    size: int
    token: int = 0
    granted: bool = False


class Truncations:
    """The truncations of a guest, by the number of the request.

    Args:
        allocator: revokes others' mappings.
        files: of the guest.
    """

    def __init__(self, allocator: Allocator, files: Files) -> None:
        self._allocator = allocator
        self._files = files
        self._under_way: dict[int, Truncation] = {}

    def is_new(self, unique: int) -> bool:
        """Whether begin would have to ask others for this request, for the first time."""
        return self._allocator.coordinates and unique not in self._under_way

    def begin(self, unique: int, nodeid: int, size: int) -> bool:
        """Whether a request may truncate a file now. If not, call this again when it is woken.

        Args:
            unique: of the request.
            nodeid: of a regular file.
            size: the new size, bytes.

        Raises:
            OSError: the file cannot be opened for writing, so that mappings cannot be revoked.
        """
        under_way = self._under_way.get(unique)
        if under_way is not None:
            lapsed = under_way.granted and not self._allocator.is_granted(under_way.token)
            if under_way.nodeid == nodeid and under_way.size <= size and not lapsed:
                return under_way.granted
            # The grant has expired, as the request waited for leases or this process was stopped; or the file has
            # changed meanwhile; or the guest misbehaves.
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

        truncation.token = self._allocator.truncate(fd, size, granted)
        return truncation.granted

    def is_current(self, unique: int) -> bool:
        """Whether the result of begin is still valid. Call it last, right before the system call.

        If not, call begin again after the next turn of the event loop.
        """
        if self._allocator.has_news:
            # The grant may have been ended, or another guest may have got the first window.
            return False
        under_way = self._under_way.get(unique)
        return under_way is None or self._allocator.is_granted(under_way.token)

    def end(self, unique: int) -> None:
        """The request has truncated the file, or will not. A request that truncates nothing may call it, too."""
        truncation = self._under_way.pop(unique, None)
        if truncation is not None:
            self._allocator.truncated(truncation.token)
            os.close(truncation.fd)

    def clear(self) -> None:
        """The session is over: end the truncations of all its requests."""
        for unique in list(self._under_way):
            self.end(unique)
