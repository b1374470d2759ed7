"""INIT: what this server and a guest's kernel agree on (include/uapi/linux/fuse.h, fs/fuse/inode.c)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from coherent_vfs.server.fuse.protocol import (
    INIT_IN,
    INIT_IN_SHORT,
    INIT_OUT,
    KERNEL_MINOR_VERSION,
    KERNEL_VERSION,
    MAX_MAX_PAGES,
    InitFlag,
)
from coherent_vfs.server.settings import Settings

OLDEST_MINOR_VERSION: Final = 27
PAGE_SHIFT: Final = 12
"""What DAX mappings are aligned to, log2 of bytes."""
MAX_WRITE: Final = MAX_MAX_PAGES * 4096
"""Bytes of the largest READ and WRITE."""

ALWAYS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.EXPORT_SUPPORT
    | InitFlag.BIG_WRITES
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.INIT_EXT
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of INIT.

    Attributes:
        minor: the protocol version in force, 7.minor.
        flags: what both sides have.
        reply: the encoded fuse_init_out.
    """

    minor: int
    flags: InitFlag
    reply: bytes


def negotiate(body: bytes, settings: Settings, *, dax: bool = False) -> Agreement:
    """Answer an INIT.

    Args:
        body: fuse_init_in; guests before 7.36 send its first 16 bytes only.
        settings: what the share offers.
        dax: whether the guest has a window to map files in.

    Raises:
        OSError: EINVAL for a short body, EPROTO for a protocol older than 7.27.
    """
    if len(body) >= INIT_IN.size:
        major, minor, max_readahead, flags, flags2 = INIT_IN.unpack_from(body)
    elif len(body) >= INIT_IN_SHORT.size:
        major, minor, max_readahead, flags = INIT_IN_SHORT.unpack_from(body)
        flags2 = 0
    else:
        raise OSError(errno.EINVAL, "INIT is too short")
    if major > KERNEL_VERSION:
        # The guest has to come down to our version and ask again.
        return Agreement(KERNEL_MINOR_VERSION, InitFlag(0), _reply(KERNEL_MINOR_VERSION, 0, InitFlag(0)))
    if major < KERNEL_VERSION or minor < OLDEST_MINOR_VERSION:
        raise OSError(errno.EPROTO, f"FUSE {major}.{minor} is older than 7.{OLDEST_MINOR_VERSION}")
    offered = InitFlag(flags)
    if InitFlag.INIT_EXT in offered:
        offered |= InitFlag(flags2 << 32)
    wanted = ALWAYS
    if settings.readdirplus:
        wanted |= InitFlag.DO_READDIRPLUS
        if settings.cache != "shared":
            wanted |= InitFlag.READDIRPLUS_AUTO
    if settings.cache in ("auto", "shared"):
        wanted |= InitFlag.AUTO_INVAL_DATA
    if settings.cache == "shared" and InitFlag.NO_OPEN_SUPPORT in offered:
        # A guest that does not open files does not ask us to truncate one by opening it.
        wanted = wanted & ~InitFlag.ATOMIC_O_TRUNC | InitFlag.NO_OPEN_SUPPORT
    if settings.cache == "always":
        wanted |= InitFlag.CACHE_SYMLINKS
    if settings.writeback:
        wanted |= InitFlag.WRITEBACK_CACHE
    if settings.allow_mmap:
        wanted |= InitFlag.DIRECT_IO_ALLOW_MMAP
    if dax:
        wanted |= InitFlag.MAP_ALIGNMENT | InitFlag.HAS_INODE_DAX
    agreed = offered & wanted
    minor = min(minor, KERNEL_MINOR_VERSION)
    return Agreement(minor, agreed, _reply(minor, max_readahead, agreed))


def _reply(minor: int, max_readahead: int, flags: InitFlag) -> bytes:
    return INIT_OUT.pack(
        KERNEL_VERSION,
        minor,
        max_readahead,
        flags & 0xFFFFFFFF,
        0,  # max_background and congestion_threshold: the guest's defaults
        0,
        MAX_WRITE,
        1,  # time_gran, nanoseconds
        MAX_MAX_PAGES,
        PAGE_SHIFT if InitFlag.MAP_ALIGNMENT in flags else 0,
        flags >> 32,
        0,
        0,
    )
