"""What an operation is given, and how it reads a request's body.

Bodies and names come from the guest: whatever is short, unterminated or too long is an EINVAL or the
errno that the host's kernel has for it, never another exception.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from struct import Struct
from typing import Any, Final, Protocol

from coherent_vfs.server.fuse.protocol import Opcode

OFFSET_MAX: Final = (1 << 63) - 1
"""Largest file offset and size, bytes."""


class Request(Protocol):
    """One FUSE request.

    Attributes:
        opcode: the operation.
        nodeid: the inode that it is about.
        unique: its number in the session.
        uid, gid, pid: of the calling process, in the guest.
        body: what follows fuse_in_header.
        reply_size: bytes that the guest gave for the reply's body.
    """

    opcode: int
    nodeid: int
    unique: int
    uid: int
    gid: int
    pid: int
    body: bytes
    reply_size: int


class Window(Protocol):
    """What the operations use of server.dax.window.Window."""

    def set_up(self, unique: int, nodeid: int, offset: int, length: int, writable: bool, place: int) -> None:
        """Map a part of a file; Parked until it is."""
        ...

    def remove(self, unique: int, places: list[tuple[int, int]]) -> None:
        """Take mappings away; Parked until they are."""
        ...


class FileSystem(Protocol):
    """What the operations use of the core's file system."""

    @property
    def readonly(self) -> bool: ...
    @property
    def xattr(self) -> bool: ...
    @property
    def writeback(self) -> bool: ...
    def fd(self, nodeid: int) -> int:
        """The O_PATH descriptor of an inode; ESTALE when the guest was not given it."""
        ...

    def handle_fd(self, nodeid: int, fh: int, writable: bool = ...) -> int:
        """The descriptor of an open handle; EBADF when it is not one of that inode.

        Args:
            writable: what a guest that opens nothing, and so has fh 0, is going to do with it.
        """
        ...

    def entry(self, parent: int, name: bytes) -> bytes:
        """Look a name up, as LOOKUP does: an encoded fuse_entry_out."""
        ...

    def entry_fd(self, fd: int, parent: int = ..., name: bytes = ...) -> bytes:
        """The same for the inode that a descriptor is open on, and the name that it has just got, if any."""
        ...

    def attr_out(self, nodeid: int) -> bytes:
        """Fresh attributes: an encoded fuse_attr_out."""
        ...

    def is_stale(self, nodeid: int) -> bool:
        """Whether the data of an inode may have changed since the guest was told its attributes."""
        ...

    def force_invalidation(self, nodeid: int) -> None:
        """Have the guest drop the pages of an inode, as soon as it asks for its attributes."""
        ...

    def open_handle(self, nodeid: int, fd: int) -> bytes:
        """Take over a descriptor as an open handle: an encoded fuse_open_out."""
        ...

    def reopen(self, nodeid: int, flags: int) -> int:
        """Open an inode: a new descriptor that the caller closes."""
        ...

    def credentials(self, uid: int, gid: int) -> AbstractContextManager[object]:
        """Act on files as that user and group."""
        ...

    def without_fsetid(self) -> AbstractContextManager[object]:
        """Act without CAP_FSETID, so that the host's kernel clears set-user-ID and set-group-ID."""
        ...

    def changing(
        self, *, inodes: Iterable[int] = (), names: Iterable[tuple[int, bytes]] = (), data: bool = ...
    ) -> AbstractContextManager[object]:
        """Announce a change of these in the journal; bump their slots at the end.

        Args:
            inodes: node ids.
            data: whether the data of these changes, if they are files.
            names: names in directories: (node id of the directory, name). The inodes that have these names,
                before and after, count as changed too.
        """
        ...

    @property
    def window(self) -> Window | None:
        """The guest's DAX window, if it has one."""
        ...

    def reaches(self, nodeid: int, size: int) -> None:
        """A file is about to have at least this size: Parked while the guest has something else mapped there."""
        ...

    def truncating(self, unique: int, nodeid: int, size: int) -> AbstractContextManager[object]:
        """Give a file a size: Parked while others have mapped what is beyond, or, as reaches(), the guest has.

        Args:
            unique: of the request.
        """
        ...

    def confirm_truncation(self, unique: int) -> None:
        """Right before the system call of a truncating() block: Parked while others may have mapped that again."""
        ...

    def prove_aware(self, value: bytes) -> None:
        """The guest proves that it checks the version table; EPERM when the proof is wrong."""
        ...


class Parked(Exception):
    """The operation has to wait for others: it begins again later.

    Args:
        seconds: after which it does, if it is not woken before by a callback of the event loop, without which it
            would wait for ever; without, what it waits for says that.
    """


Operation = Callable[[FileSystem, Request], bytes]

OPERATIONS: Final[dict[int, Operation]] = {}
"""The operations by opcode."""


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def operation(opcode: Opcode, *, changes: bool = False) -> Callable[[Operation], Operation]:
    """Enter a function in OPERATIONS.

    Args:
        opcode: what it serves.
        changes: it changes the share: EROFS where that is read-only.
    """

    def enter(function: Operation) -> Operation:
        def serve(fs: FileSystem, request: Request) -> bytes:
            if fs.readonly:
                raise error(errno.EROFS)
            return function(fs, request)

        OPERATIONS[opcode] = serve if changes else function
        return function

    return enter


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
