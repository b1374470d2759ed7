"""The short way: a write on the host is bumped while it is read, if no backend can have had a hand in it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.daemon.watch.selector import FirstSelector
from tests.unit.coherence.watch_world import SECONDS, Backend, World


@pytest.fixture
def path(world: World, backend: Backend) -> Path:
    """A file in a watched directory, whose making has been told."""
    path = world.directory / "f"
    path.touch()
    world.settle()
    world.leases.told.clear()
    world.seen.clear()
    return path


@pytest.fixture
def write(path: Path) -> Iterator[Callable[[], object]]:
    """Writes to it in place."""
    fd = os.open(path, os.O_WRONLY)
    yield lambda: os.pwrite(fd, b"x", 0)
    os.close(fd)


def served(world: World, call: Callable[[], object]) -> list[tuple[int, bool]]:
    """What is bumped for this before anything is judged."""
    call()
    world.watch.first[1]()
    return world.leases.told


def test_a_write_is_bumped_when_it_is_read(world: World, path: Path, write: Callable[[], object]) -> None:
    before = world.domain.counts.events, world.domain.counts.bumped
    stamp = world.table.stamp()
    assert served(world, write) == [(world.inode(path), True)]
    assert not world.table.valid(world.inode(path), stamp)
    assert (world.domain.counts.events, world.domain.counts.bumped) == (before[0] + 1, before[1] + 1)
    assert world.seen == [("host", "modify", os.fsencode(path))]
    world.settle()
    assert world.leases.told == [(world.inode(path), True)]


def test_data_is_told_after_the_bump(world: World, path: Path, write: Callable[[], object]) -> None:
    stamp = world.table.stamp()
    told: list[tuple[int, bool]] = []
    world.domain.on_data = lambda slot: told.append((slot, world.table.valid(slot, stamp)))
    served(world, write)
    assert told == [(world.inode(path), False)]


def test_a_file_that_is_watched_itself(world: World, backend: Backend, path: Path, write: Callable[[], object]) -> None:
    elsewhere = world.directory.parent / "link"
    elsewhere.hardlink_to(path)
    assert backend.ask(path)
    world.settle()
    world.leases.told.clear()
    world.seen.clear()
    assert set(served(world, write)) == {(world.inode(path), True)}
    assert set(world.seen) == {("host", "modify", os.fsencode(path))}


def test_the_root_of_a_share(world: World, backend: Backend, path: Path, write: Callable[[], object]) -> None:
    """A share of a single file: what is watched itself is the root, which is slot 1, too."""
    world.table.add_root(world.inode(path))
    assert served(world, write) == [(world.inode(path), True), (1, True)]


@pytest.mark.parametrize("hand", ["lock", "origin"])
def test_what_may_be_a_backends_is_left(
    world: World, backend: Backend, path: Path, write: Callable[[], object], hand: str
) -> None:
    slot = world.inode(path)
    if hand == "lock":
        world.leases.locks.add(slot)
    else:
        world.leases.origins[slot] = backend.backend_id, 1
    assert served(world, write) == []
    world.leases.locks.clear()
    world.settle()
    assert world.leases.told == [(slot, True)]


def test_an_origin_of_a_backend_that_has_gone_is_none(world: World, path: Path, write: Callable[[], object]) -> None:
    world.leases.origins[world.inode(path)] = 77, 1
    assert served(world, write) == [(world.inode(path), True)]


def test_nothing_overtakes_what_is_left(world: World, path: Path, write: Callable[[], object]) -> None:
    flag = world.directory / "flag"

    def call() -> None:
        flag.touch()
        write()

    assert served(world, call) == []
    assert served(world, write) == []
    world.settle()
    slots = [slot for slot, _ in world.leases.told]
    assert slots.index(world.name(flag)) < slots.index(world.inode(path))


def test_what_comes_before_it_is_not_held_up(world: World, path: Path, write: Callable[[], object]) -> None:
    def call() -> None:
        write()
        (world.directory / "flag").touch()

    assert served(world, call) == [(world.inode(path), True)]


def test_a_file_that_is_gone_already(world: World, path: Path, write: Callable[[], object]) -> None:
    def call() -> None:
        write()
        path.unlink()

    assert served(world, call) == []
    world.settle()
    assert (world.inode(world.directory), True) in world.leases.told


def test_nothing_has_happened(world: World, path: Path) -> None:
    assert served(world, lambda: None) == []


def test_the_longest_name(world: World, backend: Backend) -> None:
    path = world.directory / ("n" * 255)
    path.touch()
    world.settle()
    world.leases.told.clear()
    with path.open("r+b", buffering=0) as file:
        assert served(world, lambda: file.write(b"x")) == [(world.inode(path), True)]


def test_a_full_queue_is_read_to_its_end(world: World, backend: Backend) -> None:
    fds = []
    for number in range(2):
        path = world.directory / f"{number}{'n' * 200}"
        fds.append(os.open(path, os.O_WRONLY | os.O_CREAT))
    world.settle()
    world.leases.told.clear()
    for number in range(4000):
        os.pwrite(fds[number % 2], b"x", 0)
    world.settle()
    assert len(world.leases.told) == 4000
    for fd in fds:
        os.close(fd)


def test_in_the_daemons_loop(world: World, path: Path, write: Callable[[], object]) -> None:
    """Bumped at once or left to be judged: all is bumped, and the loop is told of what is left."""
    flag = world.directory / "flag"

    async def change() -> None:
        world.watch.start(asyncio.get_running_loop())
        file, directory = world.inode(path), world.inode(world.directory)
        for call, slot in ((write, file), (flag.touch, directory), (write, file), (flag.unlink, directory)):
            stamp = world.table.stamp()
            call()
            while world.table.valid(slot, stamp):
                await asyncio.sleep(0.001)

    selector = FirstSelector(*world.watch.first)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(asyncio.wait_for(change(), SECONDS))
