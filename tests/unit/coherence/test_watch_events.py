"""What the host watch bumps for each kind of change that inotify tells."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.coherence.watch_world import Backend, World

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
RENAME_EXCHANGE = 2
AT_FDCWD = -100


def exchange(first: Path, second: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE."""
    names = AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second)
    assert ctypes.CDLL(None).renameat2(*names, RENAME_EXCHANGE) == 0


def test_create(world: World, backend: Backend) -> None:
    path = world.directory / "new"
    assert world.bumped(path.touch) == {world.name(path), world.inode(world.directory), world.inode(path)}


@pytest.mark.parametrize(
    "call",
    [
        lambda path: path.open("a").write("x"),
        lambda path: os.truncate(path, 3),
        lambda path: path.open("w").close(),
    ],
)
def test_content(world: World, backend: Backend, call: Callable[[Path], object]) -> None:
    path = world.directory / "f"
    path.write_text("some text")
    assert world.bumped(lambda: call(path)) == {world.inode(path)}
    assert (world.inode(path), True) in world.leases.told


@pytest.mark.parametrize(
    "call",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.utime(path, (1, 1)),
        lambda path: os.chown(path, os.getuid(), os.getgid()),
        lambda path: os.setxattr(path, "user.colour", b"blue"),
    ],
)
def test_attributes(world: World, backend: Backend, call: Callable[[Path], object]) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    world.leases.told.clear()
    assert world.bumped(lambda: call(path)) == {world.inode(path)}
    assert world.leases.told == [(world.inode(path), False)]


def test_attributes_of_the_directory_itself(world: World, backend: Backend) -> None:
    assert world.bumped(lambda: world.directory.chmod(0o700)) == {world.inode(world.directory)}


def test_delete(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    name = world.name(path)
    assert world.bumped(path.unlink) == {name, world.inode(world.directory)}
    assert (world.inode(world.directory), True) in world.leases.told


def test_rename_over_a_file_as_editors_do(world: World, backend: Backend) -> None:
    path, new = world.directory / "f", world.directory / ".f.tmp"
    path.write_text("old")
    new.write_text("new")
    slots = world.bumped(lambda: new.rename(path))
    assert slots == {world.name(path), world.name(new), world.inode(world.directory), world.inode(path)}
    assert world.floors == 0


def test_a_write_to_a_file_that_is_renamed_before_anybody_looks(world: World, backend: Backend) -> None:
    path, new = world.directory / "f", world.directory / "g"
    path.touch()
    world.settle()
    world.leases.told.clear()

    def call() -> None:
        path.write_text("x")
        path.rename(new)

    assert world.inode(world.directory) in world.bumped(call)
    assert (world.inode(new), True) in world.leases.told


def test_counts_add_up_with_what_was_written_and_is_gone(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    world.settle()
    path.write_text("x")
    path.unlink()
    world.settle()
    counts = world.domain.counts
    assert counts.gone > 0
    assert counts.events == counts.bumped + counts.own + counts.gone


def test_exchange_of_two_names(world: World, backend: Backend) -> None:
    first, second = world.directory / "a", world.directory / "b"
    first.touch()
    second.touch()
    slots = world.bumped(lambda: exchange(first, second))
    assert slots == {
        world.inode(world.directory),
        *map(world.name, (first, second)),
        *map(world.inode, (first, second)),
    }


def test_names_of_a_share_root_are_bumped_as_its_guests_know_them(world: World, backend: Backend) -> None:
    root = world.inode(world.directory)
    world.table.add_root(root)
    path = world.directory / "f"
    slots = world.bumped(path.touch)
    assert slots == {world.name(path), world.table.name_slot(1, b"f"), root, 1, world.inode(path)}


def test_a_name_that_is_not_text(world: World, backend: Backend) -> None:
    path = Path(os.fsdecode(os.fsencode(world.directory) + b"/\xff\xfe"))
    assert world.name(path) in world.bumped(path.touch)


def test_names_are_bumped_before_inodes(world: World, backend: Backend) -> None:
    paths = [world.directory / str(number) for number in range(10)]

    def call() -> None:
        for path in paths:
            path.touch()

    world.bumped(call)
    names = [(world.name(path), False) for path in paths]
    # Two of them may share a slot.
    inodes = {world.inode(path): True for path in (world.directory, *paths)}
    assert world.leases.told == [*names, *inodes.items()]


def test_a_directory_that_nobody_asked_for(world: World, backend: Backend) -> None:
    below = world.directory / "below"
    below.mkdir()
    assert world.bumped((below / "f").touch) == set()


def test_a_file_with_two_links_is_watched_itself(world: World, backend: Backend) -> None:
    below = world.directory / "below"
    below.mkdir()
    path, other = world.directory / "f", below / "f"
    path.touch()
    os.link(path, other)
    assert backend.ask(path)
    assert world.bumped(lambda: other.write_text("x")) == {world.inode(path)}
    assert (world.inode(path), True) in world.leases.told
    assert world.bumped(lambda: other.chmod(0o600)) == {world.inode(path)}
    assert world.bumped(other.unlink) == {world.inode(path)}


def test_a_link_made_in_a_watched_directory(world: World, backend: Backend) -> None:
    path, other = world.directory / "f", world.directory / "g"
    path.touch()
    slots = world.bumped(lambda: os.link(path, other))
    assert slots == {world.name(other), world.inode(world.directory), world.inode(path)}


def test_markers_are_wanted_as_long_as_something_is_watched(world: World, backend: Backend) -> None:
    assert backend.ask(world.directory)
    assert world.leases.markers_wanted
    world.watch.leave(backend.key)
    assert not world.leases.markers_wanted


def test_a_directory_moves_with_what_is_in_it(world: World, backend: Backend) -> None:
    old, new, below = (world.directory / name for name in ("old", "new", "new/below"))
    (old / "below").mkdir(parents=True)
    for path in (old, old / "below"):
        assert backend.ask(path)
    slots = world.bumped(lambda: old.rename(new))
    assert slots == {world.name(old), world.name(new), world.inode(world.directory), world.inode(new)}
    world.seen.clear()
    assert world.bumped((below / "f").touch) == {world.name(below / "f"), world.inode(below), world.inode(below / "f")}
    assert world.seen == [("host", "create", os.fsencode(below / "f"))]
    assert world.floors == 0


def test_a_directory_that_moves_to_where_it_is_watched_no_more(world: World, backend: Backend) -> None:
    inside, outside = world.directory / "d", world.directory.parent / "outside"
    inside.mkdir()
    assert backend.ask(inside)
    world.bumped(lambda: inside.rename(outside))
    assert (world.leases.watch_epochs_ended, world.floors) == (1, 1)
    world.seen.clear()
    slots = world.bumped((outside / "f").touch)
    assert world.inode(outside / "f") in slots
    assert world.seen[0] == ("host", "create", os.fsencode(outside / "f"))


def test_a_file_that_leaves_the_watched_area(world: World, backend: Backend) -> None:
    path = world.directory / "f"
    path.touch()
    assert world.bumped(lambda: path.rename(world.directory.parent / "f")) >= {world.inode(world.directory)}
    assert (world.leases.watch_epochs_ended, world.floors) == (1, 1)


def test_a_file_that_moves_between_watched_directories(world: World, backend: Backend) -> None:
    below = world.directory / "below"
    below.mkdir()
    other = Backend(world, 2, 6, "blue")
    assert other.ask(below)
    path = world.directory / "f"
    path.touch()
    world.bumped(lambda: path.rename(below / "f"))
    assert (world.leases.watch_epochs_ended, world.floors) == (0, 0)
    # The first backend relied on the watch of the directory that the file was in: on that of the new one now.
    world.watch.leave(2)
    other.close()
    assert world.bumped(lambda: (below / "f").write_text("x")) == {world.inode(below / "f")}


def test_removed_directories_are_let_go(world: World, backend: Backend) -> None:
    for number in range(50):
        path = world.directory / "d"
        path.mkdir()
        assert backend.ask(path)
        if number % 2:
            path.rmdir()
        else:
            (world.directory / "e").mkdir()
            (world.directory / "e").rename(path)
            path.rmdir()
        world.settle()
    assert world.watch.watches == 1
    path.mkdir()
    assert backend.ask(path)
    assert world.name(path / "f") in world.bumped((path / "f").touch)


def test_removed_directories_are_let_go_however_fast_another_has_the_name(world: World, backend: Backend) -> None:
    path = world.directory / "d"
    for _ in range(500):
        path.mkdir()
        assert backend.ask(path)
        path.rmdir()
        assert world.watch.watches <= 3
    world.settle()
    world.watch.sweep(3)
    assert world.watch.watches == 1


def test_a_directory_that_was_exchanged_with_a_file_and_removed(world: World, backend: Backend) -> None:
    directory, file = world.directory / "d", world.directory / "f"
    directory.mkdir()
    file.touch()
    assert backend.ask(directory)
    exchange(directory, file)
    file.rmdir()
    world.settle()
    world.watch.sweep(2)
    assert world.watch.watches == 1


def test_a_file_with_two_names_of_which_both_are_removed(world: World, backend: Backend) -> None:
    path, other = world.directory / "f", world.directory / "g"
    path.touch()
    os.link(path, other)
    assert backend.ask(path)
    world.settle()
    # Its last name goes where nobody looks, and what told of the names before is read late.
    other.rename(world.directory.parent / "g")
    path.unlink()
    (world.directory.parent / "g").unlink()
    world.settle()
    world.watch.sweep(2)
    assert world.watch.watches == 1


def test_the_sweep_comes_to_every_watch(world: World, backend: Backend) -> None:
    paths = [world.directory / f"{number}" for number in range(10)]
    for path in paths:
        path.mkdir()
        assert backend.ask(path)
    tree = world.watch._tree
    for watched in list(tree.by_wd.values()):
        # As if no event had told where it is.
        if watched.parent is not None:
            tree.detach(watched)
    for path in paths:
        path.rmdir()
    world.settle()
    assert world.watch.watches == 11
    for left in (8, 5, 2, 1):
        world.watch.sweep(3)
        assert world.watch.watches >= left
    assert world.watch.watches == 1


def test_a_watch_descriptor_that_is_given_out_again(world: World, backend: Backend) -> None:
    """The kernel's last word about the old watch must not end the new one."""
    first, second = world.directory / "a", world.directory / "b"
    first.mkdir()
    second.mkdir()
    other = Backend(world, 2, 6, "blue")
    assert other.ask(first)
    old = world.watch._tree.by_identity[first.stat().st_dev, first.stat().st_ino].wd
    world.watch.leave(2)
    other.close()
    assert backend.ask(second)
    # Descriptors come round after 2^31 of them: as if the new watch had got the old one's.
    new = world.watch._tree.by_identity[second.stat().st_dev, second.stat().st_ino]
    del world.watch._tree.by_wd[new.wd]
    new.wd = old
    world.watch._tree.by_wd[old] = new
    world.settle()
    assert world.watch._tree.by_wd[old] is new


def test_two_directories_with_one_inode_number(world: World, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems that are made of others have them."""
    first, second = world.directory / "a", world.directory / "b"
    first.mkdir()
    second.mkdir()
    assert backend.ask(first)
    fstat = os.fstat
    descriptor = os.open(second, os.O_PATH)
    monkeypatch.setattr(os, "fstat", lambda fd: fstat(fd) if fd != descriptor else first.stat())
    assert world.watch.watch(1, descriptor)
    monkeypatch.undo()
    assert world.watch.watches == 3
    for path in (first / "f", second / "f"):
        path.touch()
        assert world.bumped(lambda path=path: path.write_text("x")) == {world.inode(path)}  # type: ignore[misc]
    world.watch.leave(1)
    assert world.watch.watches == 0


def test_unmount(world: World, backend: Backend) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root: run this as root")
    mounted = world.directory / "m"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    try:
        assert backend.ask(mounted)
        watched = world.watch._tree.by_identity[mounted.stat().st_dev, mounted.stat().st_ino]
        # As if the file system had been torn away under the descriptor that keeps it.
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, watched.fd, inheritable=False)
        os.close(null)
    finally:
        subprocess.run(["umount", mounted], check=True)
    world.settle()
    assert (world.leases.watch_epochs_ended, world.floors, world.watch.watches) == (1, 1, 1)


def test_overflow(world: World, backend: Backend) -> None:
    gone = world.directory / "gone"
    gone.mkdir()
    moved = world.directory / "moved"
    moved.mkdir()
    assert backend.ask(gone)
    assert backend.ask(moved)
    world.settle()
    path = world.directory / "f"
    for _ in range(int(QUEUE.read_text()) // 2 + 500):
        path.touch()
        path.unlink()
    gone.rmdir()
    moved.rename(world.directory / "there")
    world.settle()
    assert world.domain.counts.overflows == 1
    assert (world.leases.watch_epochs_ended, world.floors, world.watch.watches) == (1, 1, 2)
    world.seen.clear()
    path = world.directory / "there" / "f"
    assert world.name(path) in world.bumped(path.touch)
    assert world.seen[0] == ("host", "create", os.fsencode(path))


def test_a_whole_tree_is_removed(world: World, backend: Backend) -> None:
    top = world.directory / "top"
    for number in range(20):
        (top / f"{number}" / "deep").mkdir(parents=True)
        for path in (top, top / f"{number}", top / f"{number}" / "deep"):
            assert backend.ask(path)
    name = world.name(top)
    assert name in world.bumped(lambda: shutil.rmtree(top))
    assert world.watch.watches == 1
    assert world.floors == 0
