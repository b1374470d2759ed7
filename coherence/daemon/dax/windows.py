"""What is mapped in the DAX windows of a domain: places, limits, and an index from files to mappings. No I/O."""

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
    """What was asked for cannot be granted, and nothing has changed.

    Args:
        errno: that says why.
        reason: the same for people.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno


@dataclass(slots=True, eq=False)
class Window:
    """One guest's window. Only Windows changes it.

    Attributes:
        number: that no other window has.
        size: bytes.
        chunks: for each chunk of the window what is mapped there.
        mappings: how many there are.
        mapped: bytes.
        first_free: no chunk before this one is free.
    """

    number: int
    size: int
    chunks: list[Mapping | None]
    mappings: int = 0
    mapped: int = 0
    first_free: int = 0

    def __iter__(self) -> Iterator[Mapping]:
        """All mappings, by their places."""
        for position, mapping in enumerate(self.chunks):
            if mapping is not None and mapping.place == position * CHUNK:
                yield mapping

    def find_free(self, length: int) -> int:
        """The first place where so many bytes are free. Refusal when there is none."""
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
    """What is mapped of one file: end in the file, number of the window, and place in it of each, in this order.

    Attributes:
        mapped, writable: how many bytes, and how many of the mappings are to be stored into.
    """

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    mapped: int = 0
    writable: int = 0


class Windows:
    """All windows of a domain. Whatever is refused changes nothing.

    Args:
        window_limit: largest size of a window, bytes.
        total_limit: of the sizes of all windows together, bytes.

    Attributes:
        mappings, mapped: how many there are, and of how many bytes.
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
        """How many windows there are."""
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        """All windows, the oldest first."""
        return iter(self._windows.values())

    @property
    def size(self) -> int:
        """Of all windows together, bytes."""
        return sum(window.size for window in self)

    @property
    def files(self) -> int:
        """Of how many files something is mapped."""
        return len(self._files)

    def add(self, size: int, *, returning: bool = False) -> Window:
        """A new window.

        A claim is never refused for the sake of others: the guest's reader would get the error. So the limit of all
        windows together is for their sizes, and a guest whose window is full reuses its own chunks.

        Args:
            size: bytes.
            returning: whether it was granted by an earlier daemon: then there is room for it.

        Raises:
            Refusal: EINVAL no whole chunks, EFBIG larger than the limit of one, EDQUOT no room for so much besides the
                other windows.
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
        """Give back a window and all that is mapped in it."""
        for file in {(mapping.device, mapping.inode) for mapping in window}:
            # All at once: one after the other takes long where a file has many mappings.
            entries = self._files[file].entries
            entries[:] = [entry for entry in entries if entry[1] != window.number]
        for mapping in window:
            self._count(window, mapping, -1)
        del self._windows[window.number]

    def claim(
        self, window: Window, device: int, inode: int, offset: int, length: int, place: int | None, writable: bool
    ) -> Mapping:
        """Grant a part of a window.

        Args:
            window: that was added and not removed.
            device, inode, offset, length, writable: as in Mapping.
            place: in the window; None for the first that is free.

        The same as what is mapped already, but writable, makes that writable.

        Returns:
            What is mapped from now on.

        Raises:
            Refusal: EINVAL no whole chunks, or beyond the window; EBUSY overlaps another; ENOSPC no room in the
                window.
        """
        mapping = Mapping(device, inode, offset, length, 0 if place is None else place, writable)
        _check(window, mapping)
        if place is not None and writable and window.chunks[place // CHUNK] == _read_only(mapping):
            for position in _positions(mapping):
                window.chunks[position] = mapping
            self._files[device, inode].writable += 1
            return mapping
        if place is None:
            mapping = msgspec.structs.replace(mapping, place=window.find_free(length))
        self._note(window, mapping)
        return mapping

    def restore(self, window: Window, mapping: Mapping) -> None:
        """Note what is mapped already. Otherwise as claim()."""
        _check(window, mapping)
        self._note(window, mapping)

    def release(self, window: Window, place: int, length: int) -> Mapping:
        """Give back what was granted at this place with this length. Refusal: EINVAL when there is no such thing."""
        mapping = window.chunks[place // CHUNK] if place < window.size else None
        if mapping is None or (mapping.place, mapping.length) != (place, length):
            raise Refusal(errno.EINVAL, f"nothing of {length} bytes is mapped at {place}")
        for position in _positions(mapping):
            window.chunks[position] = None
        window.first_free = min(window.first_free, place // CHUNK)
        entries = self._files[mapping.device, mapping.inode].entries
        del entries[bisect_left(entries, _entry(window, mapping))]
        self._count(window, mapping, -1)
        return mapping

    def is_mapped(self, file: File) -> bool:
        """Whether something of the file is mapped anywhere."""
        return file in self._files

    def is_written(self, file: File) -> bool:
        """Whether something of the file is mapped to be stored into."""
        return file in self._files and self._files[file].writable > 0

    def mapped_files(self) -> list[File]:
        """All files of which something is mapped."""
        return list(self._files)

    def beyond(self, file: File, size: int) -> set[int]:
        """Numbers of the windows in which something of a file beyond this size is mapped."""
        index = self._files.get(file)
        if index is None:
            return set()
        first = bisect_right(index.entries, size, key=lambda entry: entry[0])
        return {number for _, number, _ in index.entries[first:]}

    def largest_files(self, most: int) -> list[FileUse]:
        """The files of which most is mapped, so many at most, that of which most is mapped first."""
        largest = heapq.nlargest(most, self._files.items(), key=lambda item: item[1].mapped)
        return [
            FileUse(*file, len(index.entries), index.mapped, len({number for _, number, _ in index.entries}))
            for file, index in largest
        ]

    def _note(self, window: Window, mapping: Mapping) -> None:
        positions = _positions(mapping)
        if any(window.chunks[position] is not None for position in positions):
            raise Refusal(errno.EBUSY, f"{mapping.length} bytes at {mapping.place} overlap another mapping")
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
    """Of its chunks in the window."""
    return range(mapping.place // CHUNK, (mapping.place + mapping.length) // CHUNK)


def _read_only(mapping: Mapping) -> Mapping:
    return msgspec.structs.replace(mapping, writable=False)


def _entry(window: Window, mapping: Mapping) -> tuple[int, int, int]:
    return mapping.offset + mapping.length, window.number, mapping.place


def _check(window: Window, mapping: Mapping) -> None:
    """Refusal when it cannot be a part of a file in this window."""
    offset, length, place = mapping.offset, mapping.length, mapping.place
    if length <= 0 or min(offset, place) < 0 or (offset | length | place) % CHUNK:
        raise Refusal(errno.EINVAL, f"{length} bytes from {offset} at {place}: no whole chunks")
    if place + length > window.size or offset + length > MAX_FILE_SIZE:
        raise Refusal(errno.EINVAL, f"{length} bytes from {offset} at {place}: beyond the window, or any file")
