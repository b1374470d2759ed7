"""One mapping in a guest's window, and the file that it is of."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

PAGE: Final = 4096


@dataclass(slots=True, eq=False)
class Mapping:
    """One mapping of the guest.

    Attributes:
        place, length: in the window, bytes.
        nodeid, device, inode, offset: what is there.
        writable: whether the guest stores into it.
        kept: how many bytes of it are of the file, the rest is scratch.
        pieces: places and lengths as the front-end has them, the file's before those of scratch.
        upgrading: whether the allocator is being told that the guest stores into it.
        refused: why the front-end has not made some piece of it, an errno; ECONNRESET after a reset.
    """

    place: int
    length: int
    nodeid: int
    device: int
    inode: int
    offset: int
    writable: bool
    kept: int
    pieces: list[tuple[int, int]] = field(default_factory=list)
    upgrading: bool = False
    refused: int = 0

    @property
    def file(self) -> tuple[int, int]:
        """Device and inode number."""
        return self.device, self.inode

    def same_as(self, other: Mapping) -> bool:
        """Whether it is the same part of the same file at the same place."""
        mine, theirs = (self.place, self.length, self.offset), (other.place, other.length, other.offset)
        return mine == theirs and self.nodeid == other.nodeid and self.file == other.file

    def pages_of(self, size: int) -> int:
        """How many bytes of it are pages that a file of this size has."""
        return min(max(-(-size // PAGE) * PAGE - self.offset, 0), self.length)

    def overlaps(self, place: int, length: int) -> bool:
        """Whether it is in this part of the window."""
        return self.place < place + length and place < self.place + self.length


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that is mapped: a descriptor of it, and the one that is mapped."""

    fd: int
    view: int

    def close(self) -> None:
        """Close both."""
        os.close(self.fd)
        os.close(self.view)
