"""The system calls of fanotify, and what its events say: fanotify(7), open_by_handle_at(2).

Python has none of them. Groups here report each event with the directory's file handle, the name, and the file
handle of the inode concerned (FAN_REPORT_DFID_NAME_TARGET, Linux 5.17).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_RENAME = 0x1000_0000
FAN_Q_OVERFLOW = 0x4000
FAN_ONDIR = 0x4000_0000

_INIT_FLAGS = 0x1 | 0x2 | 0x20 | 0x200 | 0x400 | 0x800 | 0x1000
"""FAN_CLOEXEC, FAN_NONBLOCK, FAN_UNLIMITED_MARKS, FAN_REPORT_FID, _DIR_FID, _NAME, _TARGET_FID."""
_MARK_FLAGS = 0x1 | 0x100
_UNMARK_FLAGS = 0x2 | 0x100
"""FAN_MARK_ADD or FAN_MARK_REMOVE, FAN_MARK_FILESYSTEM."""
_MASK = FAN_MODIFY | FAN_ATTRIB | FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_ONDIR

_INFO_FID, _INFO_DFID_NAME, _INFO_OLD_NAME, _INFO_NEW_NAME = 1, 2, 10, 12
_METADATA = struct.Struct("=IBBHQii")
_INFO = struct.Struct("=BBH8sIi")
_READ_BYTES = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


@dataclass(frozen=True, slots=True)
class Handle:
    """A file handle: who has it knows the inode as long as that lives, and no other inode ever has it.

    Args:
        fsid: the file system.
        content: struct file_handle.
    """

    fsid: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """What happened.

    Args:
        mask: FAN_ bits.
        pid: of the process that did it, 0 when it is in no pid namespace of ours.
        places: directories and names: one, the old and the new one of a rename, or none. A directory itself has
            the name b".".
        inode: what the event is about, None where that is not told.
    """

    mask: int
    pid: int
    places: list[tuple[Handle, bytes]]
    inode: Handle | None


def open_group() -> int:
    """A new group's descriptor, which never blocks. OSError: EPERM without CAP_SYS_ADMIN, EINVAL before Linux 5.17."""
    return _check(_libc.fanotify_init(_INIT_FLAGS, os.O_RDONLY))


def mark(group: int, fd: int) -> None:
    """Report what happens on this descriptor's file system. OSError when it has no file handles or no id."""
    _check(_libc.fanotify_mark(group, _MARK_FLAGS, _MASK, fd, None))


def unmark(group: int, fd: int) -> None:
    """Report it no more."""
    _check(_libc.fanotify_mark(group, _UNMARK_FLAGS, _MASK, fd, None))


def file_system_id(fd: int) -> int:
    """The fsid that events of this descriptor's file system carry."""
    return os.fstatvfs(fd).f_fsid


def open_handle(mount: int, handle: Handle) -> int:
    """An O_PATH descriptor of the inode.

    Args:
        mount: a descriptor, not O_PATH, of anything on its file system.
        handle: of the inode.

    Raises:
        OSError: ESTALE when the inode is gone, EPERM without CAP_DAC_READ_SEARCH.
    """
    return _check(_libc.open_by_handle_at(mount, handle.content, os.O_PATH | os.O_CLOEXEC))


def may_open_handles() -> bool:
    """Whether this process may open what it has only a handle of (CAP_DAC_READ_SEARCH)."""
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(open_handle(root, Handle(0, struct.pack("=Ii8x", 8, 1))))
    except OSError as error:
        return error.errno != errno.EPERM
    finally:
        os.close(root)
    return True


def read(group: int) -> list[Event]:
    """Some of what has happened; nothing when nothing has."""
    try:
        data = os.read(group, _READ_BYTES)
    except BlockingIOError:
        return []
    events = []
    start = 0
    while start < len(data):
        length, _, _, header, mask, _, pid = _METADATA.unpack_from(data, start)
        events.append(_event(data, start + header, start + length, mask, pid))
        start += length
    return events


def _event(data: bytes, start: int, end: int, mask: int, pid: int) -> Event:
    places = []
    inode = None
    while start < end:
        kind, _, length, fsid, size, _ = _INFO.unpack_from(data, start)
        content = start + _INFO.size - 8
        handle = Handle(int.from_bytes(fsid, "little"), data[content : content + 8 + size])
        if kind == _INFO_FID:
            inode = handle
        elif kind in (_INFO_DFID_NAME, _INFO_OLD_NAME, _INFO_NEW_NAME):
            name = data[content + 8 + size : start + length].split(b"\0", 1)[0]
            places.append((handle, name))
        start += length
    return Event(mask, pid, places, inode)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
