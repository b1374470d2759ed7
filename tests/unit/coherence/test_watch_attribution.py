"""Backends' own changes are not bumped again, and no host change is ever taken for one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest

from coherent_vfs.coherence.daemon.watch import inotify
from tests.unit.coherence.watch_world import SECONDS, Backend, World


def test_an_own_change_is_not_bumped_again(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    directory = world.inode(world.directory)
    path.touch()
    backend.mark(world.name(path), directory, world.inode(path))
    for _ in range(10):
        backend.change(lambda: path.write_text("x"), world.inode(path))
    world.settle()
    sequence = world.table.sequence
    backend.change(lambda: path.chmod(0o600), world.inode(path))
    name = world.name(path)
    slots = name, directory, world.inode(path)
    backend.change(path.unlink, *slots)
    world.settle()
    assert world.table.sequence == sequence + 4
    assert world.domain.counts.bumped == 0
    assert world.domain.counts.own >= 3
    assert {who for who, _, _ in world.seen} == {"red"}


def test_a_host_change_is_seen_although_the_queue_is_left_alone_after_own_ones(world: World, backend: Backend) -> None:
    path, other = world.directory / "f", world.directory / "g"
    path.touch()
    other.touch()
    world.settle()

    async def change_both() -> None:
        world.watch.start(asyncio.get_running_loop())
        for number in range(1, 4):
            backend.change(lambda: path.write_text("guest"), world.inode(path))
            while world.domain.counts.own < number:
                await asyncio.sleep(0)
            stamp = world.table.stamp()
            other.write_text("host")
            while world.table.valid(world.inode(other), stamp):
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(change_both(), SECONDS))


def test_a_backend_that_changes_without_end_does_not_keep_the_daemon_awake(
    world: World, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    bumped, own = world.domain.counts.bumped, world.domain.counts.own
    rounds = 0
    look_up, judge = world.watch._look_up, world.watch._judge

    def change_meanwhile() -> None:
        look_up()
        backend.change(lambda: path.write_text("guest"), world.inode(path))

    def count_rounds() -> None:
        nonlocal rounds
        rounds += 1
        judge()

    async def run() -> None:
        world.watch.start(asyncio.get_running_loop())
        backend.change(lambda: path.write_text("guest"), world.inode(path))
        await asyncio.sleep(25 * inotify.REST_SECONDS)
        assert world.domain.counts.own > own, "it is judged all the same"
        monkeypatch.undo()
        while world.watch.busy:
            await asyncio.sleep(0)

    monkeypatch.setattr(world.watch, "_look_up", change_meanwhile)
    monkeypatch.setattr(world.watch, "_judge", count_rounds)
    asyncio.run(asyncio.wait_for(run(), SECONDS))
    assert 1 < rounds <= 26
    assert world.domain.counts.bumped == bumped


def test_a_marker_that_comes_right_after_the_last_reading_is_waited_for(
    world: World, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.directory / "f"
    path.touch()
    slot = world.inode(path)
    world.settle()
    bumped, own = world.domain.counts.bumped, world.domain.counts.own
    look_up = world.watch._look_up

    def mark_and_bump() -> None:
        backend.mark(slot)
        backend.bump(slot)

    # Between the two readings, and after the second one.
    steps: list[Callable[[], object]] = [lambda: path.write_text("guest"), mark_and_bump]

    def go_on() -> None:
        look_up()
        if steps:
            steps.pop(0)()

    backend.change(lambda: path.write_text("guest"), slot)
    monkeypatch.setattr(world.watch, "_look_up", go_on)
    world.watch.process()
    assert not steps
    assert world.domain.counts.own == own, "nothing is known of it yet"
    world.settle()
    assert world.domain.counts.own == own + 1
    assert world.domain.counts.bumped == bumped


def test_a_host_change_after_the_marker_is_bumped(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    backend.change(lambda: path.write_text("guest"), world.inode(path))
    assert world.bumped(lambda: path.write_text("host")) == {world.inode(path)}


def test_a_host_change_between_an_own_one_and_its_bump_needs_none(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    before = world.domain.counts.bumped
    path.write_text("host")
    path.chmod(0o600)
    backend.change(lambda: path.write_text("guest"), world.inode(path))
    world.settle()
    assert world.domain.counts.bumped == before


def test_an_own_change_of_another_file_proves_nothing(world: World, backend: Backend) -> None:
    path, other = world.directory / "f", world.directory / "g"
    path.touch()
    other.touch()
    world.settle()

    def call() -> None:
        path.write_text("host")
        backend.mark(world.inode(other))

    assert world.bumped(call) == {world.inode(path)}


def test_markers_of_another_backend_prove_nothing(world: World, backend: Backend) -> None:
    other = Backend(world, 2, 6, "blue")
    path = world.directory / "f"
    path.touch()
    backend.change(lambda: path.write_text("guest"), world.inode(path))
    world.settle()

    def call() -> None:
        path.write_text("host")
        for _ in range(5):
            other.mark()

    assert world.bumped(call) == {world.inode(path)}
    other.close()


def test_markers_that_the_kernel_has_merged(world: World, backend: Backend) -> None:
    """Fewer markers than changes: a needless bump, never a missing one."""
    path = world.directory / "f"
    path.touch()
    world.settle()
    path.write_text("guest")
    for _ in range(3):
        backend.mark(world.inode(path))
    world.settle()
    backend.change(lambda: path.write_text("again"), world.inode(path))
    world.settle()
    assert world.bumped(lambda: path.write_text("host")) == {world.inode(path)}


def test_a_spoilt_journal_proves_nothing(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    os.truncate(backend.journal, 0)
    world.settle()

    def call() -> None:
        path.write_text("guest")
        backend.mark(world.inode(path))

    assert world.inode(path) in world.bumped(call)


def test_a_change_waits_for_the_lock_on_its_slot(
    world: World, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose it is cannot be told before the origin is written, and that is so once the slot is unlocked."""
    monkeypatch.setattr(inotify, "LOCK_SECONDS", SECONDS)
    path = world.directory / "f"
    path.touch()
    slot = world.inode(path)
    world.settle()
    sequence = world.table.sequence
    world.leases.locks.add(slot)
    path.write_text("guest")
    world.watch.process()
    assert world.watch.busy
    backend.mark(slot)
    world.watch.process()
    world.leases.locks.clear()
    world.settle()
    assert world.table.sequence == sequence


def test_a_lock_that_is_held_for_long_keeps_no_bump_back(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    world.leases.locks.add(world.inode(path))
    begun = time.monotonic()
    assert world.bumped(lambda: path.write_text("host")) == {world.inode(path)}
    assert time.monotonic() - begun >= inotify.LOCK_SECONDS


def test_a_backend_that_has_gone_proves_nothing(world: World, backend: Backend) -> None:
    other = Backend(world, 2, 6, "blue")
    assert other.ask(world.directory)
    path = world.directory / "f"
    path.touch()
    world.settle()

    def call() -> None:
        path.write_text("host")
        backend.mark(world.inode(path))
        world.watch.leave(1)

    assert world.bumped(call) == {world.inode(path)}
    other.close()
