"""What the device and its file system need to know; made from the command line by server.options."""

from pathlib import Path
from typing import Final, Literal

import msgspec

from coherent_vfs.server.caching.policy import CacheMode, CachePolicy, cache_policy

TAG_MAX: Final = 36
"""Longest tag, bytes (virtio 1.3, 5.11.4)."""


DaxMode = Literal["never", "always", "inode", "auto"]

DAX_WINDOW: Final = 512 << 20
"""Bytes of a guest's DAX window: QEMU 11.1 gets slow with more mappings, and has at most 480.

docs/reference/vhost-user.md has the times.
"""
DAX_MIN_SIZE: Final = 64 << 10
"""Bytes of the smallest file that --dax auto has mapped."""
LEASE_MAX: Final = 1.0
"""Seconds of the longest lease."""
LEASE_MARGIN: Final = 0.2
"""Seconds of a lease that are for the way of the reply."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one share served to one guest.

    Attributes:
        shared_dir: the directory, as the user named it; for messages only.
        root_fd: an O_PATH descriptor of it; stays with whoever opened it.
        tag: the tag offered in the device's configuration space; None offers none.
        cache: the cache mode.
        timeout: seconds that names and attributes are valid, instead of the mode's own.
        lease_max: seconds of the longest lease that a stock guest in mode shared is given.
        lease_margin: seconds of that which are for the way of the reply.
        writeback: let the guest delay its writes.
        xattr: serve extended attributes.
        readonly: refuse every change with EROFS.
        readdirplus: offer READDIRPLUS.
        allow_mmap: let the guest map files shared even where its data is not cached.
        allow_direct_io: pass the guest's O_DIRECT on to the host.
        num_request_queues: request queues, besides the hiprio queue.
        dax: which files a guest that leaves it to us maps: all, those with the flag that chattr(1) calls x, or those
            of at least dax_min_size bytes.
        dax_min_size: bytes.
        window_bytes: size of the DAX window: 0 for none, or a power of two from 2 MiB.
        queue_size: largest number of descriptors in a queue; a power of two.
    """

    shared_dir: Path
    root_fd: int
    tag: str | None = None
    cache: CacheMode = "auto"
    timeout: float | None = None
    lease_max: float = LEASE_MAX
    lease_margin: float = LEASE_MARGIN
    writeback: bool = False
    xattr: bool = False
    readonly: bool = False
    readdirplus: bool = True
    allow_mmap: bool = False
    allow_direct_io: bool = False
    num_request_queues: int = 1
    dax: DaxMode = "never"
    dax_min_size: int = DAX_MIN_SIZE
    window_bytes: int = 0
    queue_size: int = 1024

    def policy(self, *, aware: bool = False) -> CachePolicy:
        """The cache policy for the guest; aware: it proved that it checks the version table."""
        return cache_policy(self.cache, timeout=self.timeout, aware=aware)
