"""What a check and a bump of the version table cost, from Python and compiled.

The compiled loops run ITERATIONS operations a call; the bars are for one of them, uncontended.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import posix_ipc  # type: ignore[import-not-found]
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compiled import load
from coherent_vfs.coherence.shm.table import Table

ITERATIONS = 100_000
CHECK_NANOSECONDS = 5
BUMP_NANOSECONDS = 40

loop = load("table_loop")


@pytest.fixture
def table() -> Iterator[Table]:
    name = f"/bench.{os.getpid()}.{secrets.token_hex(4)}"
    table = Table.create(name)
    yield table
    table.close()
    posix_ipc.unlink_shared_memory(name)


def nanoseconds(benchmark: BenchmarkFixture) -> float:
    """The median of one operation of a compiled loop."""
    assert benchmark.stats is not None
    each = float(benchmark.stats.stats.median) / ITERATIONS * 1e9
    benchmark.extra_info["nanoseconds_each"] = each
    return each


def test_check_compiled(benchmark: BenchmarkFixture, table: Table) -> None:
    good = benchmark(loop.check, table, 5, ITERATIONS)
    assert good == ITERATIONS
    assert nanoseconds(benchmark) <= CHECK_NANOSECONDS


def test_bump_compiled(benchmark: BenchmarkFixture, table: Table) -> None:
    last = benchmark(loop.bump, table, 5, ITERATIONS)
    assert last == table.sequence == table.slot(5)
    assert nanoseconds(benchmark) <= BUMP_NANOSECONDS


def test_check_from_python(benchmark: BenchmarkFixture, table: Table) -> None:
    assert benchmark(table.valid, 5, table.stamp())


def test_bump_from_python(benchmark: BenchmarkFixture, table: Table) -> None:
    assert benchmark(table.bump, 5) == table.sequence


def test_name_slot_from_python(benchmark: BenchmarkFixture, table: Table) -> None:
    assert benchmark(table.name_slot, 5, b"some-file-name.txt") < table.slot_count
