"""The guest's DAX window: address space of this process, into which the back-end has files mapped.

It is virtio shared memory region 0 (virtio 1.2, 2.10 and 5.11.5), as a virtual machine monitor keeps it. Where
nothing is mapped there is memory that holds nothing: a driver that goes wrong, or whose back-end does, reads zeros
and does not crash. Access to a mapped page beyond the end of its file is SIGBUS, as everywhere.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

MAX_SIZE: Final = 1 << 40
"""Bytes of the largest window. It takes address space, no memory."""
REPLACE_SECONDS: Final = 10.0
"""That a back-end may take to replace a mapping."""
_OFFSET_MAX: Final = (1 << 63) - 1
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_ANONYMOUS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# linux/mman.h; Python does not have them.
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


class Window:
    """Address space, and what is mapped where. Several threads may use it.

    It stays until the last view of it is gone.

    Args:
        size: bytes, a multiple of the page size.

    Raises:
        ValueError: impossible size.
    """

    def __init__(self, size: int) -> None:
        if not 0 < size <= MAX_SIZE or size % mmap.PAGESIZE:
            raise ValueError(f"a window of {size} bytes")
        self.size = size
        self._memory = mmap.mmap(-1, size, flags=_ANONYMOUS | _MAP_NORESERVE)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._memory))
        self._mapped: dict[int, int] = {}
        self._moffsets: list[int] = []
        self._changed = threading.Condition(threading.Lock())

    def map(self, fd: int, file_offset: int, moffset: int, length: int, *, writable: bool) -> None:
        """Map a piece of a file where nothing is mapped.

        Args:
            fd: the file; stays the caller's.
            file_offset: where the piece begins in the file, bytes, a multiple of the page size.
            moffset: where it goes in the window, bytes, a multiple of the page size.
            length: bytes, a multiple of the page size.
            writable: whether stores reach the file; otherwise they are lost.

        Raises:
            OSError: EINVAL, it is not within the window; EEXIST, something is mapped there; EACCES, the descriptor
                does not permit it; and as mmap(2).
        """
        self._map(fd, file_offset, moffset, length, writable, replace=False)

    def replace(self, fd: int, file_offset: int, moffset: int, length: int, *, writable: bool) -> None:
        """As map(), but replaces what is mapped there, or a part of it. A reader sees the old mapping or the new.

        Remains of another mapping, in front or behind, become mappings of their own.
        """
        self._map(fd, file_offset, moffset, length, writable, replace=True)

    def _map(self, fd: int, file_offset: int, moffset: int, length: int, writable: bool, *, replace: bool) -> None:
        if not 0 <= file_offset <= _OFFSET_MAX - length or file_offset % mmap.PAGESIZE:
            _refuse(errno.EINVAL)
        with self._changed:
            self._check(moffset, length)
            there = [each for each in self._moffsets if each < moffset + length and moffset < each + self._mapped[each]]
            if there and not replace:
                _refuse(errno.EEXIST)
            self._exchange(moffset, length, mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE, fd, file_offset)
            remain = {moffset: length}
            for each in there:
                end = each + self._mapped.pop(each)
                remain |= {
                    start: stop - start for start, stop in ((each, moffset), (moffset + length, end)) if start < stop
                }
            self._mapped |= remain
            self._moffsets = sorted(self._mapped)
            self._changed.notify_all()

    def unmap(self, moffset: int, length: int) -> None:
        """Remove what one map() has mapped, all of it. Raises OSError: EINVAL, there is no such mapping."""
        with self._changed:
            self._check(moffset, length)
            if self._mapped.get(moffset) != length:
                _refuse(errno.EINVAL)
            self._exchange(moffset, length, _ANONYMOUS | _MAP_NORESERVE)
            del self._mapped[moffset]
            self._moffsets.remove(moffset)

    def clear(self) -> None:
        """Remove all mappings."""
        with self._changed:
            self._exchange(0, self.size, _ANONYMOUS | _MAP_NORESERVE)
            self._mapped.clear()
            self._moffsets.clear()

    def is_mapped(self, moffset: int, length: int) -> bool:
        """Whether all of this range is mapped, by one map() or by several."""
        with self._changed:
            return self._covered(moffset, length)

    def load(self, moffset: int, length: int) -> bytes:
        """Copy out of the window what is mapped there.

        A back-end may remove a mapping before it maps another one: this waits for that.

        Raises:
            OSError: EIO, nothing is mapped there after REPLACE_SECONDS.
        """
        with self._covering(moffset, length):
            return bytes(self.view(moffset, length))

    def store(self, moffset: int, data: memoryview) -> None:
        """Copy into what is mapped there; otherwise as load()."""
        with self._covering(moffset, len(data)):
            self.view(moffset, len(data))[:] = data

    def piece(self, moffset: int, length: int) -> ctypes.Array[ctypes.c_ubyte]:
        """A range of the window, as memoryview() takes it. It shows later mappings, too."""
        return (ctypes.c_ubyte * length).from_buffer(self._memory, moffset)

    def view(self, moffset: int, length: int) -> memoryview:
        """A range of the window, writable. It reads as zeros while the back-end replaces a mapping there."""
        return memoryview(self.piece(moffset, length)).cast("B")

    @contextmanager
    def _covering(self, moffset: int, length: int) -> Iterator[None]:
        """Wait until all of this range is mapped, and keep it mapped for the block."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._covered(moffset, length), REPLACE_SECONDS):
                raise OSError(errno.EIO, "nothing is mapped in the window where a file should be")
            yield

    def _covered(self, moffset: int, length: int) -> bool:
        at, end = bisect_right(self._moffsets, moffset) - 1, moffset
        while end < moffset + length:
            if at >= len(self._moffsets) or (at >= 0 and self._moffsets[at] > end) or self._end_of(at) <= end:
                return False
            end = self._end_of(at)
            at += 1
        return True

    def _end_of(self, index: int) -> int:
        """Where a mapping ends; 0 in front of the first."""
        return self._moffsets[index] + self._mapped[self._moffsets[index]] if index >= 0 else 0

    def _check(self, moffset: int, length: int) -> None:
        if length <= 0 or moffset < 0 or (moffset | length) % mmap.PAGESIZE or moffset + length > self.size:
            _refuse(errno.EINVAL)

    def _exchange(self, moffset: int, length: int, flags: int, fd: int = -1, file_offset: int = 0) -> None:
        address = _libc.mmap(self._address + moffset, length, _READ_WRITE, flags | _MAP_FIXED, fd, file_offset)
        if address == _MAP_FAILED:
            _refuse(ctypes.get_errno())


def _refuse(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))
