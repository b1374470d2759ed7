"""One mapping in a guest's window, and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

PAGE: Final = 4096


@dataclass(slots=True, eq=False)
class Mapping:
    """One mapping of the guest.

    Attributes:
        moffset, length: in the window, bytes.
        nodeid, device, inode, offset: the file, and the offset in it.
        writable: whether the guest stores into it.
        kept: its first bytes, which show the file; the rest is a scratch mapping.
        pieces: moffset and length of each piece that the front-end has mapped; those of the file come first.
        upgrading: whether a claim for write access is under way.
        refused: errno of a piece that the front-end has not mapped; ECONNRESET after a reset.
    """

    moffset: int
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
        """Whether it is the same range of the same file at the same moffset."""
        mine, theirs = (self.moffset, self.length, self.offset), (other.moffset, other.length, other.offset)
        return mine == theirs and self.nodeid == other.nodeid and self.file == other.file

    def pages_of(self, size: int) -> int:
        """Bytes of it that are pages of a file of this size."""
        return min(max(-(-size // PAGE) * PAGE - self.offset, 0), self.length)

    def overlaps(self, moffset: int, length: int) -> bool:
        """Whether it overlaps this range of the window."""
        return self.moffset < moffset + length and moffset < self.moffset + self.length


@dataclass(frozen=True, slots=True)
class Opened:
    """A mapped file: its own descriptor, and that of its view, which is mapped."""

    fd: int
    view: int

    def close(self) -> None:
        """Close both."""
        os.close(self.fd)
        os.close(self.view)
