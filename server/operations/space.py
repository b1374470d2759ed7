"""What concerns the data of files, other than READ and WRITE: FSYNC, FSYNCDIR, SYNCFS, LSEEK, FALLOCATE,
COPY_FILE_RANGE and COPY_FILE_RANGE_64."""

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from coherent_vfs.server.fuse.protocol import (
    COPY_FILE_RANGE_IN,
    COPY_FILE_RANGE_OUT,
    FALLOCATE_IN,
    FSYNC_FDATASYNC,
    FSYNC_IN,
    LSEEK_IN,
    LSEEK_OUT,
    WRITE_OUT,
)
from coherent_vfs.server.host.errors import error
from coherent_vfs.server.host.syscalls import fallocate as sys_fallocate
from coherent_vfs.server.host.syscalls import syncfs as sys_syncfs
from coherent_vfs.server.operations.body import checked_offset, readable_fd, unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request

COPY_MAX: Final = 64 << 20
"""Most bytes that one COPY_FILE_RANGE copies: the guest's other requests wait for it, and the caller asks
for the rest, as after any short copy. A multiple of every block size, so that extents can still be shared."""
FALLOC_FL_COLLAPSE_RANGE: Final = 0x08
FALLOCATE_MODES: Final = 0x7F
"""FALLOC_FL_* (linux/falloc.h)."""


def fsync(fs: FileSystem, request: Request) -> bytes:
    fh, flags = unpack(FSYNC_IN, request.body)
    fd = fs.handle_fd(request.nodeid, fh)
    if flags & FSYNC_FDATASYNC:
        os.fdatasync(fd)
    else:
        os.fsync(fd)
    return b""


def fsyncdir(fs: FileSystem, request: Request) -> bytes:
    return fsync(fs, request)


def syncfs(fs: FileSystem, request: Request) -> bytes:
    """Write out the host's file system that the inode is on."""
    fd = readable_fd(fs, request.nodeid)
    try:
        sys_syncfs(fd)
    finally:
        os.close(fd)
    return b""


def lseek(fs: FileSystem, request: Request) -> bytes:
    """SEEK_DATA and SEEK_HOLE; the guest knows the other answers itself.

    In writeback mode the guest has data that the host takes for a hole or the end of the file. After ENOSYS it does
    not ask again and takes each file for data up to the size that it knows (fuse_lseek() in fs/fuse/file.c).
    """
    if fs.writeback:
        raise error(errno.ENOSYS)
    fh, offset, whence = unpack(LSEEK_IN, request.body)
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise error(errno.EINVAL)
    return LSEEK_OUT.pack(os.lseek(fs.handle_fd(request.nodeid, fh), offset, whence))


def fallocate(fs: FileSystem, request: Request) -> bytes:
    fh, offset, length, mode = unpack(FALLOCATE_IN, request.body)
    if mode & ~FALLOCATE_MODES:
        raise error(errno.EOPNOTSUPP)
    fd = fs.handle_fd(request.nodeid, fh, writable=True)
    end = checked_offset(offset) + checked_offset(length)
    shorter = mode & FALLOC_FL_COLLAPSE_RANGE
    if not shorter:
        fs.reaches(request.nodeid, end)
    with (
        fs.truncating(request.unique, request.nodeid, max(os.fstat(fd).st_size - length, 0))
        if shorter
        else nullcontext(),
        fs.changing(inodes=(request.nodeid,), data=True),
        _as_privileged_as(fs, request),
    ):
        if shorter:
            fs.confirm_truncation(request.unique)
        sys_fallocate(fd, mode, offset, length)
    return b""


def copy_file_range(fs: FileSystem, request: Request) -> bytes:
    return WRITE_OUT.pack(_copy(fs, request))


def copy_file_range_64(fs: FileSystem, request: Request) -> bytes:
    return COPY_FILE_RANGE_OUT.pack(_copy(fs, request))


def _copy(fs: FileSystem, request: Request) -> int:
    """Bytes copied from one open file to another, or within one."""
    fh_in, off_in, nodeid_out, fh_out, off_out, length, flags = unpack(COPY_FILE_RANGE_IN, request.body)
    if flags:
        raise error(errno.EINVAL)
    # In this order: of one file, the descriptor to write to does for both.
    target = fs.handle_fd(nodeid_out, fh_out, writable=True)
    source = fs.handle_fd(request.nodeid, fh_in)
    fs.reaches(nodeid_out, checked_offset(off_out) + min(length, COPY_MAX))
    with fs.changing(inodes=(nodeid_out,), data=True), _as_privileged_as(fs, request):
        return os.copy_file_range(
            source, target, min(length, COPY_MAX), checked_offset(off_in), checked_offset(off_out)
        )


def _as_privileged_as(fs: FileSystem, request: Request) -> AbstractContextManager[object]:
    """Let a change by others than root clear set-user-ID and set-group-ID of the file, as a WRITE does.

    With FUSE_HANDLE_KILLPRIV_V2 the guest leaves that to us, and these requests have no flag for it.
    """
    return fs.without_fsetid() if request.uid else nullcontext()
