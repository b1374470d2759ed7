"""The mappings in the DAX windows of a domain: window offsets, limits, and an index by file. No I/O."""

from __future__ import annotations

import errno
import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import FileUse, Mapping

MAX_FILE_SIZE = (1 << 63) - 1

File = tuple[int, int]
"""st_dev and st_ino."""


class Refusal(Exception):
    """A request cannot be granted; nothing has changed.

    Args:
        errno: the reason.
        reason: the same as text.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno


@dataclass(slots=True, eq=False)
class Window:
    """One guest's window. Only Windows changes it.

    Attributes:
        number: unique among windows.
        size: bytes.
        chunks: the mapping at each chunk of the window.
        mappings: number of mappings.
        mapped: bytes in all mappings.
        first_free: no chunk before this one is free.
    """

    number: int
    size: int
    chunks: list[Mapping | None]
    mappings: int = 0
    mapped: int = 0
    first_free: int = 0

    def __iter__(self) -> Iterator[Mapping]:
        """All mappings, by moffset."""
        for position, mapping in enumerate(self.chunks):
            if mapping is not None and mapping.moffset == position * CHUNK:
                yield mapping

    def find_free(self, length: int) -> int:
        """The first moffset with so many free bytes. Raises Refusal when there is none."""
        wanted, start = length // CHUNK, self.first_free
        while start + wanted <= len(self.chunks):
            try:
                start = self.chunks.index(None, start)
            except ValueError:
                break
            end = start
            while end < len(self.chunks) and end - start < wanted and self.chunks[end] is None:
                end += 1
            if end - start == wanted:
                return start * CHUNK
            start = end
        raise Refusal(errno.ENOSPC, f"no room for {length} bytes in the window")


@dataclass(slots=True, eq=False)
class _FileIndex:
    """The mappings of one file.

    Attributes:
        entries: for each its end in the file, the number of the window and the moffset; sorted.
        mapped: bytes in all of them.
        writable: number of writable mappings.
    """

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    mapped: int = 0
    writable: int = 0


class Windows:
    """All windows of a domain. A refused request changes nothing.

    Args:
        window_limit: largest size of a window, bytes.
        total_limit: largest sum of the sizes of all windows, bytes.

    Attributes:
        mappings, mapped: number of mappings in all windows, and their bytes.
    """

    def __init__(self, window_limit: int, total_limit: int) -> None:
        self.window_limit = window_limit
        self.total_limit = total_limit
        self.mappings = 0
        self.mapped = 0
        self._windows: dict[int, Window] = {}
        self._files: dict[File, _FileIndex] = {}
        self._next_number = 0

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        """All windows, the oldest first."""
        return iter(self._windows.values())

    @property
    def size(self) -> int:
        """Sum of the sizes of all windows, bytes."""
        return sum(window.size for window in self)

    @property
    def files(self) -> int:
        """Number of files with mappings."""
        return len(self._files)

    def add(self, size: int, *, returning: bool = False) -> Window:
        """A new window.

        The limit of all windows counts their sizes, not their mappings. So a claim never fails because of other guests,
        which a reader in the guest would see as an error; a guest with a full window reuses its own chunks.

        Args:
            size: bytes.
            returning: whether an earlier daemon granted it: then the limit of all windows does not apply.

        Raises:
            Refusal: EINVAL no whole chunks, EFBIG larger than the limit of one window, EDQUOT beyond the limit of all
                windows.
        """
        if size <= 0 or size % CHUNK:
            raise Refusal(errno.EINVAL, f"a window of {size} bytes has no whole chunks")
        if size > self.window_limit:
            raise Refusal(errno.EFBIG, f"a window of {size} bytes is larger than the limit")
        if not returning and self.size + size > self.total_limit:
            raise Refusal(errno.EDQUOT, f"a window of {size} bytes is more than is left of the limit of all windows")
        window = Window(self._next_number, size, [None] * (size // CHUNK))
        self._next_number += 1
        self._windows[window.number] = window
        return window

    def remove(self, window: Window) -> None:
        """Remove a window and all its mappings."""
        for file in {(mapping.device, mapping.inode) for mapping in window}:
            # All at once: one after the other takes long where a file has many mappings.
            entries = self._files[file].entries
            entries[:] = [entry for entry in entries if entry[1] != window.number]
        for mapping in window:
            self._count(window, mapping, -1)
        del self._windows[window.number]

    def claim(
        self, window: Window, device: int, inode: int, offset: int, length: int, moffset: int | None, writable: bool
    ) -> Mapping:
        """Grant a range of a window.

        Args:
            window: that was added and not removed.
            device, inode, offset, length, writable: as in Mapping.
            moffset: in the window; None: the first with enough free bytes.

        Claiming a read-only mapping again as writable makes it writable.

        Returns:
            The new mapping.

        Raises:
            Refusal: EINVAL no whole chunks, or beyond the window; EBUSY overlaps another; ENOSPC no room in the
                window.
        """
        mapping = Mapping(device, inode, offset, length, 0 if moffset is None else moffset, writable)
        _check(window, mapping)
        if moffset is not None and writable and window.chunks[moffset // CHUNK] == _read_only(mapping):
            for position in _positions(mapping):
                window.chunks[position] = mapping
            self._files[device, inode].writable += 1
            return mapping
        if moffset is None:
            mapping = msgspec.structs.replace(mapping, moffset=window.find_free(length))
        self._note(window, mapping)
        return mapping

    def restore(self, window: Window, mapping: Mapping) -> None:
        """Note a mapping that exists already. Otherwise as claim()."""
        _check(window, mapping)
        self._note(window, mapping)

    def release(self, window: Window, moffset: int, length: int) -> Mapping:
        """Give back the mapping at this moffset with this length. Raises Refusal: EINVAL, there is none."""
        mapping = window.chunks[moffset // CHUNK] if moffset < window.size else None
        if mapping is None or (mapping.moffset, mapping.length) != (moffset, length):
            raise Refusal(errno.EINVAL, f"nothing of {length} bytes is mapped at {moffset}")
        for position in _positions(mapping):
            window.chunks[position] = None
        window.first_free = min(window.first_free, moffset // CHUNK)
        entries = self._files[mapping.device, mapping.inode].entries
        del entries[bisect_left(entries, _entry(window, mapping))]
        self._count(window, mapping, -1)
        return mapping

    def is_mapped(self, file: File) -> bool:
        """Whether the file has a mapping in any window."""
        return file in self._files

    def is_written(self, file: File) -> bool:
        """Whether the file has a writable mapping."""
        return file in self._files and self._files[file].writable > 0

    def mapped_files(self) -> list[File]:
        """All files with mappings."""
        return list(self._files)

    def beyond(self, file: File, size: int) -> set[int]:
        """Numbers of the windows with mappings of a file beyond this size."""
        index = self._files.get(file)
        if index is None:
            return set()
        first = bisect_right(index.entries, size, key=lambda entry: entry[0])
        return {number for _, number, _ in index.entries[first:]}

    def largest_files(self, most: int) -> list[FileUse]:
        """At most so many files, those with the most mapped bytes, in descending order."""
        largest = heapq.nlargest(most, self._files.items(), key=lambda item: item[1].mapped)
        return [
            FileUse(*file, len(index.entries), index.mapped, len({number for _, number, _ in index.entries}))
            for file, index in largest
        ]

    def _note(self, window: Window, mapping: Mapping) -> None:
        positions = _positions(mapping)
        if any(window.chunks[position] is not None for position in positions):
            raise Refusal(errno.EBUSY, f"{mapping.length} bytes at {mapping.moffset} overlap another mapping")
        for position in positions:
            window.chunks[position] = mapping
        if window.first_free == positions.start:
            window.first_free = positions.stop
        index = self._files.setdefault((mapping.device, mapping.inode), _FileIndex())
        insort(index.entries, _entry(window, mapping))
        self._count(window, mapping, 1)

    def _count(self, window: Window, mapping: Mapping, sign: int) -> None:
        """Count a mapping that has come (1) or gone (-1)."""
        file = mapping.device, mapping.inode
        index = self._files[file]
        for counted in (self, window):
            counted.mappings += sign
            counted.mapped += sign * mapping.length
        index.mapped += sign * mapping.length
        index.writable += sign * mapping.writable
        if not index.mapped:
            del self._files[file]


def _positions(mapping: Mapping) -> range:
    """Indexes of its chunks in the window."""
    return range(mapping.moffset // CHUNK, (mapping.moffset + mapping.length) // CHUNK)


def _read_only(mapping: Mapping) -> Mapping:
    return msgspec.structs.replace(mapping, writable=False)


def _entry(window: Window, mapping: Mapping) -> tuple[int, int, int]:
    return mapping.offset + mapping.length, window.number, mapping.moffset


def _check(window: Window, mapping: Mapping) -> None:
    """Raise Refusal when the mapping has no whole chunks or is out of range."""
    offset, length, moffset = mapping.offset, mapping.length, mapping.moffset
    if length <= 0 or min(offset, moffset) < 0 or (offset | length | moffset) % CHUNK:
        raise Refusal(errno.EINVAL, f"{length} bytes from {offset} at {moffset}: no whole chunks")
    if moffset + length > window.size or offset + length > MAX_FILE_SIZE:
        raise Refusal(errno.EINVAL, f"{length} bytes from {offset} at {moffset}: beyond the window, or any file")
