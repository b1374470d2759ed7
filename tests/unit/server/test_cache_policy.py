"""The table of cache modes."""

from pathlib import Path

import pytest

from coherent_vfs.server.caching.policy import CachePolicy, cache_policy
from coherent_vfs.server.fuse.protocol import OpenFlag
from coherent_vfs.server.settings import Settings

ASK = CachePolicy(0.0, OpenFlag.DIRECT_IO, OpenFlag(0))
KEEP = CachePolicy(86400.0, OpenFlag.KEEP_CACHE, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)


def test_modes() -> None:
    assert cache_policy("none") == ASK
    assert cache_policy("auto") == CachePolicy(1.0, OpenFlag(0), OpenFlag(0))
    assert cache_policy("always") == KEEP
    assert cache_policy("shared", aware=True) == KEEP


def test_a_stock_guest_in_shared_keeps_no_time_but_pages() -> None:
    assert cache_policy("shared") == CachePolicy(0.0, KEEP.file_flags, KEEP.directory_flags)


def test_only_shared_heeds_awareness() -> None:
    assert cache_policy("none", aware=True) == ASK
    assert cache_policy("auto", aware=True).timeout == 1.0


def test_timeout_replaces_the_modes_own() -> None:
    settings = Settings(shared_dir=Path("/"), root_fd=-1, cache="auto", timeout=0.25)
    assert settings.policy().timeout == 0.25


@pytest.mark.parametrize(
    ("timeout", "valid"),
    [(0.0, (0, 0)), (1.5, (1, 500_000_000)), (0.9999999999, (1, 0)), (86400.0, (86400, 0))],
)
def test_timeout_in_seconds_and_nanoseconds(timeout: float, valid: tuple[int, int]) -> None:
    assert CachePolicy(timeout, OpenFlag(0), OpenFlag(0)).valid == valid
