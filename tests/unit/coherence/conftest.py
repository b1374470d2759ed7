"""Shared memory names that no other test run uses, and that are gone afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import Places
from coherent_vfs.coherence.shm.table import Table
from tests.unit.coherence.watch_world import Backend, World


@pytest.fixture
def places() -> Iterator[Places]:
    places = Places(f"/unit.{os.getpid()}.{secrets.token_hex(4)}")
    yield places
    for key in places.journal_keys():
        liveness.remove(key)
        places.journal(key).unlink()
    places.table.unlink(missing_ok=True)
    places.leases.unlink(missing_ok=True)
    places.lock.unlink(missing_ok=True)


@pytest.fixture
def table(places: Places) -> Iterator[Table]:
    # So many that no two of the few that a test uses are the same by chance.
    table = Table.create(places.name, 1 << 20)
    yield table
    table.close()


@pytest.fixture
def leases(places: Places, table: Table) -> Iterator[Leases]:
    leases = Leases.create(f"/{places.leases.name}", table)
    yield leases
    leases.close()


@pytest.fixture
def world(tmp_path: Path, table: Table, places: Places) -> Iterator[World]:
    directory = tmp_path / "share"
    directory.mkdir()
    world = World(directory, table, places.table)
    yield world
    world.watch.close()


@pytest.fixture
def backend(world: World) -> Iterator[Backend]:
    """A backend that has asked for the world's directory."""
    backend = Backend(world, 1, 5, "red")
    assert backend.ask(world.directory)
    yield backend
    backend.close()
