"""DAX: SETUPMAPPING and REMOVEMAPPING."""

import errno
from contextlib import nullcontext

from coherent_vfs.server.dax.window import Window
from coherent_vfs.server.fuse.protocol import (
    REMOVEMAPPING_IN,
    REMOVEMAPPING_ONE,
    SETUPMAPPING_IN,
    SetupMappingFlag,
)
from coherent_vfs.server.host.errors import error
from coherent_vfs.server.operations.body import unpack
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request


def _window(fs: FileSystem) -> Window:
    if fs.window is None:
        raise error(errno.ENOSYS)
    return fs.window


def setup_mapping(fs: FileSystem, request: Request) -> bytes:
    """Map a range of a file at the moffset that the guest has chosen. Linux sends no handle (fs/fuse/dax.c)."""
    _, offset, length, flags, moffset = unpack(SETUPMAPPING_IN, request.body)
    writable = bool(flags & SetupMappingFlag.WRITE)
    if writable and fs.readonly:
        raise error(errno.EROFS)
    window = _window(fs)
    # Stores bump nothing, so no guest may cache the file: coherenced pins its slot from now on.
    with fs.changing(inodes=(request.nodeid,), data=True) if writable else nullcontext():
        window.set_up(request.unique, request.nodeid, offset, length, writable, moffset)
    return b""


def remove_mapping(fs: FileSystem, request: Request) -> bytes:
    """Remove mappings, named by moffset and length."""
    (count,) = unpack(REMOVEMAPPING_IN, request.body)
    if len(request.body) < REMOVEMAPPING_IN.size + count * REMOVEMAPPING_ONE.size:
        raise error(errno.EINVAL)
    ranges = [
        REMOVEMAPPING_ONE.unpack_from(request.body, REMOVEMAPPING_IN.size + number * REMOVEMAPPING_ONE.size)
        for number in range(count)
    ]
    _window(fs).remove(request.unique, ranges)
    return b""
