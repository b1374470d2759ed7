"""How an operation in Python reads a request's body.

Bodies and names come from the guest: whatever is short, unterminated or too long is an EINVAL or the errno that the
host's kernel has for it, never another exception.
"""

import errno
import os
import stat
from struct import Struct
from typing import Any, Final

from coherent_vfs.server.host.errors import error
from coherent_vfs.server.session.file_system import FileSystem

OFFSET_MAX: Final = (1 << 63) - 1
"""Largest file offset and size, bytes."""


def unpack(layout: Struct, body: bytes) -> tuple[Any, ...]:
    """The fields at the beginning of a body; EINVAL when it is too short."""
    if len(body) < layout.size:
        raise error(errno.EINVAL)
    return layout.unpack_from(body)


def strings(body: bytes, offset: int, count: int) -> list[bytes]:
    """The NUL-terminated strings that make up the rest of a body; EINVAL when they are not `count`."""
    parts = body[offset:].split(b"\0")
    if len(parts) != count + 1 or parts.pop() != b"":
        raise error(errno.EINVAL)
    return parts


def checked_offset(value: int) -> int:
    """An offset or length in a file, bytes; EINVAL when no file reaches so far."""
    if not 0 <= value <= OFFSET_MAX:
        raise error(errno.EINVAL)
    return value


def proc_path(fd: int) -> bytes:
    """The path by which a system call that takes no O_PATH descriptor reaches its inode.

    The link leads to the inode itself and no further: not through a symbolic link, if it is one.
    """
    return b"/proc/self/fd/%d" % fd


def readable_fd(fs: FileSystem, nodeid: int) -> int:
    """A new descriptor of a file or directory, for reading; EINVAL for others, as opening a device or a
    FIFO does something."""
    if stat.S_IFMT(os.fstat(fs.fd(nodeid)).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise error(errno.EINVAL)
    return fs.reopen(nodeid, os.O_RDONLY)
