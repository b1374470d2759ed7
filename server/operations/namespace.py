"""What gives an inode a name or takes it away: MKNOD, MKDIR, TMPFILE, RMDIR, RENAME and RENAME2.

The guest has applied the umask already (FUSE_DONT_MASK is not negotiated), and this process has none.
"""

import errno
import os
import stat
from typing import Final

from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    ENTRY_OUT,
    MKDIR_IN,
    MKNOD_IN,
    RENAME2_IN,
    RENAME_IN,
    EntryOut,
)
from coherent_vfs.server.host.errors import error
from coherent_vfs.server.host.names import checked_name
from coherent_vfs.server.host.syscalls import renameat2
from coherent_vfs.server.operations.body import strings, unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request

RENAME_FLAGS: Final = 0b111
"""RENAME_NOREPLACE, RENAME_EXCHANGE and RENAME_WHITEOUT (linux/fs.h)."""


def mknod(fs: FileSystem, request: Request) -> bytes:
    """A file, FIFO, socket or device; rdev has the bits of the first 32 of the host's dev_t."""
    mode, rdev, _umask = unpack(MKNOD_IN, request.body)
    name = checked_name(*strings(request.body, MKNOD_IN.size, 1))
    parent = fs.fd(request.nodeid)
    kind = stat.S_IFMT(mode)
    with (
        fs.changing(inodes=(request.nodeid,), names=((request.nodeid, name),)),
        fs.credentials(request.uid, request.gid),
    ):
        os.mknod(name, kind | stat.S_IMODE(mode), rdev, dir_fd=parent)
    return fs.entry(request.nodeid, name)


def mkdir(fs: FileSystem, request: Request) -> bytes:
    mode, _umask = unpack(MKDIR_IN, request.body)
    name = checked_name(*strings(request.body, MKDIR_IN.size, 1))
    parent = fs.fd(request.nodeid)
    with (
        fs.changing(inodes=(request.nodeid,), names=((request.nodeid, name),)),
        fs.credentials(request.uid, request.gid),
    ):
        os.mkdir(name, stat.S_IMODE(mode), dir_fd=parent)
    return fs.entry(request.nodeid, name)


def tmpfile(fs: FileSystem, request: Request) -> bytes:
    """An open file without a name: fuse_entry_out, then fuse_open_out. The name in the request is none."""
    _flags, mode, _umask, _open_flags = unpack(CREATE_IN, request.body)
    with fs.credentials(request.uid, request.gid):
        fd = os.open(
            ".",
            os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC,
            stat.S_IMODE(mode),
            dir_fd=fs.fd(request.nodeid),
        )
    try:
        entry = fs.entry_fd(fd)
    except OSError:
        os.close(fd)
        raise
    return entry + fs.open_handle(EntryOut._make(ENTRY_OUT.unpack_from(entry)).nodeid, fd)


def rmdir(fs: FileSystem, request: Request) -> bytes:
    name = checked_name(*strings(request.body, 0, 1))
    parent = fs.fd(request.nodeid)
    with fs.changing(inodes=(request.nodeid,), names=((request.nodeid, name),)):
        os.rmdir(name, dir_fd=parent)
    return b""


def rename(fs: FileSystem, request: Request) -> bytes:
    (newdir,) = unpack(RENAME_IN, request.body)
    return _rename(fs, request, RENAME_IN.size, newdir, 0)


def rename2(fs: FileSystem, request: Request) -> bytes:
    """RENAME that does not replace, exchanges, or leaves a whiteout."""
    newdir, flags = unpack(RENAME2_IN, request.body)
    if flags & ~RENAME_FLAGS:
        raise error(errno.EINVAL)
    return _rename(fs, request, RENAME2_IN.size, newdir, flags)


def _rename(fs: FileSystem, request: Request, offset: int, newdir: int, flags: int) -> bytes:
    oldname, newname = map(checked_name, strings(request.body, offset, 2))
    olddir = request.nodeid
    old, new = fs.fd(olddir), fs.fd(newdir)
    with fs.changing(inodes={olddir, newdir}, names={(olddir, oldname), (newdir, newname)}):
        renameat2(old, oldname, new, newname, flags)
    return b""
