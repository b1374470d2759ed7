"""What a guest must see: the same observations made on the host, in the shared directory itself."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.torture.actions import Action, Kind, Result


class Truth:
    """The host's view of a share. It only reads: nothing of it is noticed by guests.

    Args:
        share: The shared directory.
    """

    def __init__(self, share: Path) -> None:
        self._share = str(share)

    def see(self, observation: Action, held: Mapping[int, int]) -> Result:
        """What this observation must give now.

        Args:
            observation: As asked of a guest.
            held: The host's own descriptor of the file that the guest holds in each slot.
        """
        try:
            if observation.kind is Kind.READ_HELD:
                return _read(held[observation.slot])
            return _WAYS[observation.kind](f"{self._share}/{observation.path}")
        except OSError as error:
            return Result(error.errno or 0)


def _status(status: os.stat_result) -> Result:
    return Result(
        error=0,
        mode=status.st_mode,
        links=status.st_nlink,
        uid=status.st_uid,
        gid=status.st_gid,
        inode=status.st_ino,
        size=0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        mtime=status.st_mtime_ns,
        ctime=status.st_ctime_ns,
    )


def _read(fd: int) -> Result:
    result = _status(os.fstat(fd))
    return result._replace(content=zlib.crc32(os.pread(fd, result.size, 0)))


def _lstat(path: str) -> Result:
    return _status(os.lstat(path))


def _open(path: str) -> Result:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return _read(fd)
    finally:
        os.close(fd)


_TYPES = {stat.S_IFREG: 8, stat.S_IFDIR: 4, stat.S_IFLNK: 10}
"""DT_REG, DT_DIR, DT_LNK (dirent.h)."""


def _list(path: str) -> Result:
    with os.scandir(path) as entries:
        names = sorted(
            f"{entry.name}/{_TYPES[stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)]}" for entry in entries
        )
    return Result(0, size=len(names), content=zlib.crc32("".join(f"{name}\0" for name in names).encode()))


def _bytes(data: bytes) -> Result:
    return Result(0, size=len(data), content=zlib.crc32(data))


_WAYS: dict[Kind, Callable[[str], Result]] = {
    Kind.LSTAT: _lstat,
    Kind.OPEN: _open,
    Kind.MAP: _open,
    Kind.LIST: _list,
    Kind.READ_LINK: lambda path: _bytes(os.fsencode(Path(path).readlink())),
    Kind.GET_XATTR: lambda path: _bytes(os.getxattr(path, "user.torture", follow_symlinks=False)),
}
