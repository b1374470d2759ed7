"""What each cache mode lets a guest keep, and for how long (docs/reference/vfs-backend.md has the table)."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from coherent_vfs.server.fuse.protocol import OpenFlag

CacheMode = Literal["none", "auto", "always", "shared"]
CACHE_MODES: Final[tuple[CacheMode, ...]] = get_args(CacheMode)

AUTO_TIMEOUT: Final = 1.0
"""Seconds that names and attributes are valid in mode auto."""
LONG_TIMEOUT: Final = 86400.0
"""Seconds that names and attributes are valid where time does not decide."""


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """The answers that decide what one guest caches.

    Attributes:
        timeout: seconds that names and attributes are valid.
        file_flags: fuse_open_out.open_flags of files.
        directory_flags: the same of directories.
    """

    timeout: float
    file_flags: OpenFlag
    directory_flags: OpenFlag

    @property
    def valid(self) -> tuple[int, int]:
        """The timeout as FUSE has it: whole seconds and nanoseconds."""
        seconds, nanoseconds = divmod(round(self.timeout * 1_000_000_000), 1_000_000_000)
        return seconds, nanoseconds


def cache_policy(mode: CacheMode, *, timeout: float | None = None, aware: bool = False) -> CachePolicy:
    """The policy of a mode.

    Args:
        mode: the cache mode.
        timeout: seconds, instead of the mode's own (auto and always only).
        aware: shared only: the guest proved that it checks the version table.
    """
    if mode == "auto":
        return CachePolicy(AUTO_TIMEOUT if timeout is None else timeout, OpenFlag(0), OpenFlag(0))
    if mode == "always" or (mode == "shared" and aware):
        return CachePolicy(
            LONG_TIMEOUT if timeout is None else timeout,
            OpenFlag.KEEP_CACHE,
            OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR,
        )
    if mode == "shared":
        # What a stock guest may keep, and for how long, is found for each thing (server.caching.validity); it compares
        # pages and lists with the attributes (AUTO_INVAL_DATA).
        return CachePolicy(0.0, OpenFlag.KEEP_CACHE, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)
    return CachePolicy(0.0, OpenFlag.DIRECT_IO, OpenFlag(0))
