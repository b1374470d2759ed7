"""Shared memory names that no other test run uses, and that are gone afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table
from tests.unit.coherence.watch_world import Backend, World


@pytest.fixture
def paths() -> Iterator[DomainPaths]:
    paths = DomainPaths(f"/unit.{os.getpid()}.{secrets.token_hex(4)}")
    yield paths
    for key in paths.journal_keys():
        liveness.remove(key)
        paths.journal(key).unlink()
    paths.table.unlink(missing_ok=True)
    paths.leases.unlink(missing_ok=True)
    paths.lock.unlink(missing_ok=True)


@pytest.fixture
def table(paths: DomainPaths) -> Iterator[Table]:
    # So many that no two of the few that a test uses are the same by chance.
    table = Table.create(paths.name, 1 << 20)
    yield table
    table.close()


@pytest.fixture
def leases(paths: DomainPaths, table: Table) -> Iterator[Leases]:
    leases = Leases.create(f"/{paths.leases.name}", table)
    yield leases
    leases.close()


@pytest.fixture
def world(tmp_path: Path, table: Table, paths: DomainPaths) -> Iterator[World]:
    directory = tmp_path / "share"
    directory.mkdir()
    world = World(directory, table, paths.table)
    yield world
    world.watch.close()


@pytest.fixture
def backend(world: World) -> Iterator[Backend]:
    """A backend that has asked for the world's directory."""
    backend = Backend(world, 1, 5, "red")
    assert backend.ask(world.directory)
    yield backend
    backend.close()
