"""SETATTR, ACCESS and STATFS."""

import errno
import os
import stat
from contextlib import nullcontext
from typing import Final

from coherent_vfs.server.fuse.protocol import ACCESS_IN, KSTATFS, SETATTR_IN, FattrFlag, Kstatfs, SetattrIn
from coherent_vfs.server.host.errors import error
from coherent_vfs.server.host.syscalls import UTIME_NOW, UTIME_OMIT, utimensat
from coherent_vfs.server.operations.body import OFFSET_MAX, proc_path, unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request

NO_ID: Final = 0xFFFFFFFF
"""A user or group id that is none: chown(2) leaves it as it is."""


def setattr_(fs: FileSystem, request: Request) -> bytes:
    """Mode, owner, size and times, in this order: the later ones follow from the earlier ones.

    FATTR_FH picks the handle for the size alone: an open file may be resized whatever its mode is now.
    FATTR_CTIME (writeback mode) is left out: no system call sets it.
    """
    new = SetattrIn._make(unpack(SETATTR_IN, request.body))
    valid = FattrFlag(new.valid)
    fd = fs.fd(request.nodeid)
    path = proc_path(fd)
    with (
        fs.truncating(request.unique, request.nodeid, new.size) if valid & FattrFlag.SIZE else nullcontext(),
        fs.changing(inodes=(request.nodeid,), data=bool(valid & FattrFlag.SIZE)),
    ):
        # The guest takes what this reply says without dropping pages that were older than another guest's change.
        stale = fs.is_stale(request.nodeid)
        if valid & FattrFlag.MODE:
            _chmod(fd, new.mode)
        if valid & (FattrFlag.UID | FattrFlag.GID):
            uid = new.uid if valid & FattrFlag.UID and new.uid != NO_ID else -1
            gid = new.gid if valid & FattrFlag.GID and new.gid != NO_ID else -1
            os.chown(path, uid, gid)
        if valid & FattrFlag.SIZE:
            target = fs.handle_fd(request.nodeid, new.fh, writable=True) if valid & FattrFlag.FH else path
            fs.confirm_truncation(request.unique)
            if valid & FattrFlag.KILL_SUIDGID:
                with fs.without_fsetid():
                    _truncate(target, new.size)
            else:
                _truncate(target, new.size)
        if valid & (FattrFlag.ATIME | FattrFlag.MTIME | FattrFlag.ATIME_NOW | FattrFlag.MTIME_NOW):
            utimensat(
                path,
                new.atime,
                _nanoseconds(valid, FattrFlag.ATIME, FattrFlag.ATIME_NOW, new.atimensec),
                new.mtime,
                _nanoseconds(valid, FattrFlag.MTIME, FattrFlag.MTIME_NOW, new.mtimensec),
            )
    reply = fs.attr_out(request.nodeid)
    if stale:
        fs.force_invalidation(request.nodeid)
    return reply


def _chmod(fd: int, mode: int) -> None:
    if stat.S_ISLNK(os.fstat(fd).st_mode):
        raise error(errno.EOPNOTSUPP)  # some file systems change it and then fail
    os.chmod(proc_path(fd), stat.S_IMODE(mode))  # noqa: PTH101 (no pathlib for a descriptor's path)


def _truncate(target: int | bytes, size: int) -> None:
    if size > OFFSET_MAX:
        raise error(errno.EFBIG)
    os.truncate(target, size)


def _nanoseconds(valid: FattrFlag, given: FattrFlag, now: FattrFlag, nanoseconds: int) -> int:
    """The nanoseconds of one time for utimensat(2), with its special values."""
    if valid & now:
        return UTIME_NOW
    if not valid & given:
        return UTIME_OMIT
    if nanoseconds >= 1_000_000_000:
        raise error(errno.EINVAL)
    return nanoseconds


def access(fs: FileSystem, request: Request) -> bytes:
    """Whether the caller may do that, by the mode alone: a request does not tell of its other groups.

    A Linux guest does not ask: on virtio-fs it checks permissions itself.
    """
    (mask,) = unpack(ACCESS_IN, request.body)
    if mask & ~(os.R_OK | os.W_OK | os.X_OK):
        raise error(errno.EINVAL)
    st = os.fstat(fs.fd(request.nodeid))
    if mask & os.W_OK and fs.readonly:
        raise error(errno.EROFS)
    if mask & ~_granted(st, request.uid, request.gid):
        raise error(errno.EACCES)
    return b""


def _granted(st: os.stat_result, uid: int, gid: int) -> int:
    """R_OK, W_OK and X_OK as far as the mode grants them to that user."""
    if uid == 0:
        executable = stat.S_ISDIR(st.st_mode) or st.st_mode & 0o111
        return os.R_OK | os.W_OK | (os.X_OK if executable else 0)
    shift = 6 if uid == st.st_uid else 3 if gid == st.st_gid else 0
    return st.st_mode >> shift & 0o7


def statfs(fs: FileSystem, request: Request) -> bytes:
    """The state of the file system that the inode is on."""
    st = os.fstatvfs(fs.fd(request.nodeid))
    return KSTATFS.pack(
        *Kstatfs(
            blocks=st.f_blocks,
            bfree=st.f_bfree,
            bavail=st.f_bavail,
            files=st.f_files,
            ffree=st.f_ffree,
            bsize=st.f_bsize,
            namelen=st.f_namemax,
            frsize=st.f_frsize,
        )
    )
