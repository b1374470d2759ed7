"""System calls that the standard library lacks. Each raises OSError with the call's errno."""

from typing import Final

UTIME_NOW: Final[int]
"""As nanoseconds: set this time to now."""
UTIME_OMIT: Final[int]
"""As nanoseconds: leave this time as it is."""

def renameat2(olddirfd: int, oldname: bytes, newdirfd: int, newname: bytes, flags: int) -> None:
    """renameat2(2); flags: RENAME_*."""

def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); mode: FALLOC_FL_*; offset and length in bytes."""

def syncfs(fd: int) -> None:
    """syncfs(2): write out the file system that fd is on."""

def utimensat(path: bytes, atime: int, atimensec: int, mtime: int, mtimensec: int) -> None:
    """utimensat(2) of a path, following symbolic links; seconds, and nanoseconds or UTIME_*."""
