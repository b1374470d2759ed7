"""The floor protocol, without sockets; the backends' deaths are real ones in tests/integration."""

from __future__ import annotations

import os

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.daemon import journals
from coherent_vfs.coherence.daemon.registry import MAX_LEFT_ROOTS, Registry
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import TRUST_NOTHING, Journal, Table

PID = os.getpid()
ROOT = (1, 2)


@pytest.fixture
def registry(table: Table, leases: Leases, paths: DomainPaths) -> Registry:
    registry = Registry(table, leases, paths)
    registry.recover()
    return registry


def join(registry: Registry, root: tuple[int, int] = ROOT) -> int:
    key = registry.grant(PID, os.getuid(), None)
    liveness.take(key)
    registry.register(key, PID, root)
    return key


def end(registry: Registry, key: int) -> None:
    """The backend ends."""
    liveness.let_go(key)
    registry.leave(key)


def test_a_table_without_backends_is_trusted_at_once(registry: Registry, table: Table) -> None:
    assert registry.trusted
    assert table.floor == table.sequence


def test_what_was_cached_before_a_restart_is_not_trusted(table: Table, leases: Leases, paths: DomainPaths) -> None:
    stamp = table.stamp()
    Registry(table, leases, paths).recover()
    assert not table.valid(5, stamp)


def test_a_root_is_in_the_table_from_when_the_backend_is_a_member(registry: Registry, table: Table) -> None:
    registry.grant(PID, os.getuid(), None)
    assert not table.root_bits
    join(registry)
    assert table.is_root(table.inode_slot(*ROOT))


def test_a_join_that_is_refused_leaves_nothing(registry: Registry, table: Table, paths: DomainPaths) -> None:
    for number in range(300):
        key = registry.grant(PID, os.getuid(), None)
        with pytest.raises(UserError, match="not held"):
            registry.register(key, PID, (1, number))
        registry.leave(key)
    assert (table.root_bits, table.root_epoch) == (frozenset(), 0)
    assert paths.journal_keys() == []


def test_as_many_shares_one_after_the_other_as_come(registry: Registry, table: Table) -> None:
    for number in range(1000):
        key = join(registry, (1, number))
        assert table.is_root(table.inode_slot(1, number))
        end(registry, key)
    assert len(table.root_bits) <= MAX_LEFT_ROOTS
    # Not all of a sudden for each that goes: everybody fetches everything anew then.
    assert registry.floor_raises["shares"] == 1000 // (MAX_LEFT_ROOTS + 1)


def test_a_root_is_forgotten_only_when_nothing_that_was_fetched_under_it_is_good(
    registry: Registry, table: Table
) -> None:
    """A guest outlives its backend, and goes on checking what it has under slot 1."""
    stays = join(registry, (1, 7))
    end(registry, join(registry, (1, 8)))
    root, stamp = table.inode_slot(1, 8), table.stamp()
    assert table.is_root(root)
    assert table.valid(table.name_slot(1, b"name"), stamp)
    registry.raise_floor("overflow")
    assert not table.is_root(root)
    assert not table.valid(table.name_slot(1, b"name"), stamp)
    assert table.is_root(table.inode_slot(1, 7))
    end(registry, stays)


def test_a_root_stays_as_long_as_one_of_its_backends_lives(registry: Registry, table: Table) -> None:
    first, second = join(registry), join(registry)
    end(registry, first)
    registry.raise_floor("overflow")
    assert table.is_root(table.inode_slot(*ROOT))
    # It lives and is not connected: it may come back, and serves its guest meanwhile.
    registry.leave(second)
    registry.raise_floor("overflow")
    assert table.is_root(table.inode_slot(*ROOT))
    liveness.let_go(second)
    registry.sweep()
    assert not table.is_root(table.inode_slot(*ROOT))


def test_roots_outlive_the_daemon_until_all_backends_are_back(
    registry: Registry, table: Table, leases: Leases, paths: DomainPaths
) -> None:
    backends = {join(registry, (1, inode)): (1, inode) for inode in (7, 8)}
    end(registry, join(registry, (1, 9)))
    registry.close()
    after = Registry(table, leases, paths)
    after.recover()
    assert all(table.is_root(table.inode_slot(1, inode)) for inode in (7, 8, 9))
    for key, root in backends.items():
        assert after.grant(PID, os.getuid(), key) == key
        after.register(key, PID, root)
    assert after.trusted
    assert [table.is_root(table.inode_slot(1, inode)) for inode in (7, 8, 9)] == [True, True, False]
    for key in backends:
        end(after, key)


def test_a_backend_without_its_semaphore_is_no_member(registry: Registry) -> None:
    key = registry.grant(PID, os.getuid(), None)
    with pytest.raises(UserError, match="not held"):
        registry.register(key, PID, ROOT)


def test_a_semaphore_held_by_another_process_does_not_count(registry: Registry) -> None:
    key = registry.grant(PID, os.getuid(), None)
    liveness.take(key)
    with pytest.raises(UserError, match="not held"):
        registry.register(key, PID + 1, ROOT)


def test_a_living_backend_that_is_gone_makes_everybody_ask_until_it_is_back(registry: Registry, table: Table) -> None:
    key = join(registry)
    registry.leave(key)
    assert table.floor == TRUST_NOTHING
    registry.sweep()
    assert table.floor == TRUST_NOTHING
    assert registry.grant(PID, os.getuid(), key) == key
    registry.register(key, PID, ROOT)
    assert table.floor == table.sequence
    assert registry.trusted


def test_a_new_backend_does_not_lower_the_floor_for_a_missing_one(registry: Registry, table: Table) -> None:
    key = join(registry)
    registry.leave(key)
    join(registry)
    assert table.floor == TRUST_NOTHING


def test_a_missing_backend_that_dies_is_buried(registry: Registry, table: Table, paths: DomainPaths) -> None:
    key = join(registry)
    registry.leave(key)
    liveness.let_go(key)
    registry.sweep()
    assert registry.trusted
    assert paths.journal_keys() == []


def test_a_journal_that_is_not_missing_is_not_given_to_who_asks_for_it(registry: Registry) -> None:
    key = join(registry)
    assert registry.grant(PID, os.getuid(), key) != key


def test_a_missing_journal_is_given_to_its_holder_only(registry: Registry) -> None:
    key = join(registry)
    registry.leave(key)
    assert registry.grant(PID + 1, os.getuid(), key) != key


def test_an_overflow_while_distrusted_does_not_end_the_distrust(
    registry: Registry, table: Table, paths: DomainPaths, expect_log: object
) -> None:
    assert callable(expect_log)
    expect_log("may have changed anything")
    missing, dead = join(registry), join(registry)
    registry.leave(missing)
    paths.journal(dead).write_bytes(b"")
    liveness.let_go(dead)
    registry.leave(dead)
    assert table.floor == TRUST_NOTHING


def test_a_backend_of_another_table_is_not_waited_for(
    table: Table, leases: Leases, paths: DomainPaths, expect_log: object
) -> None:
    assert callable(expect_log)
    expect_log("with a table that was removed")
    key = journals.create(paths, bytes(16), os.getuid(), 3)
    liveness.take(key)
    registry = Registry(table, leases, paths)
    registry.recover()
    assert registry.trusted
    assert registry.outside_pids() == [PID]
    liveness.let_go(key)
    registry.sweep()
    assert registry.outside_pids() == []
    assert paths.journal_keys() == []


def test_the_end_of_the_daemon_distrusts(registry: Registry, table: Table) -> None:
    registry.close()
    assert table.floor == TRUST_NOTHING


def test_one_that_joins_and_goes_again_and_again_does_not_use_up_the_semaphores(
    registry: Registry, paths: DomainPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coherent_vfs.coherence.daemon.registry.MAX_BACKENDS", 3)
    for _ in range(3):
        registry.leave(join(registry))
    with pytest.raises(UserError, match="3 backends already"):
        join(registry)
    assert len(paths.journal_keys()) == 3


@pytest.mark.parametrize("new_root", [(1, 3), ROOT])
def test_a_change_begun_before_its_directory_became_a_root_makes_everybody_ask_at_a_death(
    registry: Registry, table: Table, paths: DomainPaths, new_root: tuple[int, int]
) -> None:
    key = join(registry)
    journal = os.open(paths.journal(key), os.O_RDWR)
    try:
        Journal.from_fd(journal).announce([table.name_slot(table.inode_slot(*new_root), b"name")])
    finally:
        os.close(journal)
    other = join(registry, new_root)
    stamp = table.stamp()
    end(registry, key)
    assert table.valid(table.name_slot(1, b"name"), stamp) == (new_root == ROOT)
    end(registry, other)


def test_a_distrust_of_a_backend_that_died_before_it_came_back_ends(registry: Registry, table: Table) -> None:
    key = join(registry)
    stamp = table.stamp()
    table.distrust()
    liveness.let_go(key)
    registry.leave(key)
    registry.sweep()
    assert table.floor == table.sequence > stamp
