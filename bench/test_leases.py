"""What a lease costs who gives it, and what the lock costs a change that meets none.

The compiled loops run ITERATIONS operations a call, uncontended; the bars are for one of them. That of a lock
includes one look at the clock.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import posix_ipc  # type: ignore[import-not-found]
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compiled import load
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import Table

ITERATIONS = 100_000
GRANT_NANOSECONDS = 100
LOCK_NANOSECONDS = 250
HASH = 7 << 46 | 5

loop = load("lease_loop")


@pytest.fixture
def leases() -> Iterator[Leases]:
    name = f"/bench.{os.getpid()}.{secrets.token_hex(4)}"
    table = Table.create(name)
    try:
        leases = Leases.create(f"{name}.leases", table)
        yield leases
        leases.close()
        posix_ipc.unlink_shared_memory(f"{name}.leases")
    finally:
        table.close()
        posix_ipc.unlink_shared_memory(name)


def nanoseconds(benchmark: BenchmarkFixture) -> float:
    """The median of one operation of a compiled loop."""
    assert benchmark.stats is not None
    each = float(benchmark.stats.stats.median) / ITERATIONS * 1e9
    benchmark.extra_info["nanoseconds_each"] = each
    return each


def test_grant_compiled(benchmark: BenchmarkFixture, leases: Leases) -> None:
    assert benchmark(loop.grant, leases, HASH, 1, ITERATIONS) == ITERATIONS
    assert nanoseconds(benchmark) <= GRANT_NANOSECONDS


def test_lock_and_unlock_compiled(benchmark: BenchmarkFixture, leases: Leases) -> None:
    assert benchmark(loop.lock, leases, HASH, 1, ITERATIONS) == ITERATIONS
    assert nanoseconds(benchmark) <= LOCK_NANOSECONDS
