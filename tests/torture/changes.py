"""Random changes: what is done, which names it concerns, and what must have come of it."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tests.torture.actions import Action, Kind, contents
from tests.torture.world import Thing, World

LARGEST = 9000
"""Bytes of a file: up to three pages."""
_MOST_FILES, _FEWEST_FILES = 16, 5
_RENAME_EXCHANGE = 2
_DEEPEST = 4
_ACROSS = 0.1
"""How often something is moved to another directory, when it is renamed."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of one guest.

    Attributes:
        actions: What it does, in order.
        concerned: Names whose state it may change, parents not counted.
        inodes: Inodes whose files it may change: whoever holds them open looks at them.
        error: The errno that every action must give.
        becomes: For a path: the file's contents afterwards.
    """

    actions: Sequence[Action]
    concerned: Sequence[str]
    inodes: Sequence[int] = ()
    error: int = 0
    becomes: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(map(str, self.actions))


class Held(NamedTuple):
    """A file that a guest holds open: a descriptor of the host's own for the same file, and its inode."""

    fd: int
    inode: int


class Generator:
    """Makes random changes.

    Args:
        rng: Decides everything.
        links: Whether the file system has links, owners, modes and extended attributes.
    """

    def __init__(self, rng: random.Random, *, links: bool = True) -> None:
        self._rng = rng
        self._values = 0
        self._makers = [maker for maker in _MAKERS if links or maker not in _NEED_LINKS]
        self._weights = [_MAKERS[maker] for maker in self._makers]

    def next(self, world: World, held: Mapping[int, Held]) -> Change:
        """A change that is possible in this world.

        Args:
            world: What there is.
            held: What the guest that will make the change holds open, by slot.
        """
        while True:
            maker = self._rng.choices(self._makers, self._weights)[0]
            try:
                return maker(self, world, held)
            except LookupError:
                continue

    def value(self) -> int:
        """What the next change writes: each is different, also from that of a race."""
        self._values += 1
        return self._values << 8 | self._rng.randrange(256)

    def create(self, world: World, held: Mapping[int, Held]) -> Change:
        if len(world.files) >= _MOST_FILES:
            raise LookupError
        path, length, value = world.free(), self._rng.randrange(LARGEST), self.value()
        action = Action(Kind.CREATE, path, length=length, value=value)
        return Change([action], [path], becomes={path: contents(length, value)})

    def overwrite(self, world: World, held: Mapping[int, Held]) -> Change:
        """Other contents, the same size."""
        file = world.pick(world.files)
        return self._write(world, file, 0, file.size)

    def overwrite_unseen(self, world: World, held: Mapping[int, Held]) -> Change:
        """Other contents, the same size and the same mtime."""
        file = world.pick(world.files)
        written = self._write(world, file, 0, file.size)
        back = Action(Kind.TOUCH, file.path, value=file.status.st_mtime_ns)
        return dataclasses.replace(written, actions=[*written.actions, back])

    def write_somewhere(self, world: World, held: Mapping[int, Held]) -> Change:
        file = world.pick(world.files)
        offset = self._rng.randrange(file.size + 500)
        return self._write(world, file, offset, self._rng.randrange(1, max(2, min(5000, LARGEST + 500 - offset))))

    def write_held(self, world: World, held: Mapping[int, Held]) -> Change:
        """Through a descriptor that was opened long ago; the file may have no name any more."""
        slot, file = self._pick_held(held)
        old, value = os.pread(file.fd, 2 * LARGEST, 0), self.value()
        offset = self._rng.randrange(len(old) + 1)
        length = self._rng.randrange(1, max(2, min(5000, LARGEST + 500 - offset)))
        action = Action(Kind.WRITE_HELD, slot=slot, offset=offset, length=length, value=value)
        return self._of_inode(world, action, file.inode, _patched(old, offset, contents(length, value)))

    def append(self, world: World, held: Mapping[int, Held]) -> Change:
        file = world.pick([file for file in world.files if file.size < LARGEST])
        length, value = self._rng.randrange(1, 300), self.value()
        action = Action(Kind.WRITE, file.path, flags=os.O_APPEND, length=length, value=value)
        return self._of_inode(world, action, file.inode, world.content(file.path) + contents(length, value))

    def replace_contents(self, world: World, held: Mapping[int, Held]) -> Change:
        file = world.pick(world.files)
        length, value = self._rng.randrange(LARGEST), self.value()
        action = Action(Kind.WRITE, file.path, flags=os.O_TRUNC, length=length, value=value)
        return self._of_inode(world, action, file.inode, contents(length, value))

    def truncate(self, world: World, held: Mapping[int, Held]) -> Change:
        file, length = world.pick(world.files), self._rng.randrange(LARGEST)
        becomes = world.content(file.path)[:length].ljust(length, b"\0")
        return self._of_inode(world, Action(Kind.TRUNCATE, file.path, length=length), file.inode, becomes)

    def truncate_held(self, world: World, held: Mapping[int, Held]) -> Change:
        slot, file = self._pick_held(held)
        length = self._rng.randrange(LARGEST)
        becomes = os.pread(file.fd, 2 * LARGEST, 0)[:length].ljust(length, b"\0")
        return self._of_inode(world, Action(Kind.TRUNCATE_HELD, slot=slot, length=length), file.inode, becomes)

    def change_mode(self, world: World, held: Mapping[int, Held]) -> Change:
        thing = world.pick([*world.files, *world.folders])
        mode = 0o700 | self._rng.randrange(0o100)
        return self._of_thing(world, Action(Kind.CHMOD, thing.path, flags=mode), thing)

    def change_owner(self, world: World, held: Mapping[int, Held]) -> Change:
        thing = world.pick(world.things)
        value = self._rng.randrange(1000) << 16 | self._rng.randrange(1000)
        return self._of_thing(world, Action(Kind.CHOWN, thing.path, value=value), thing)

    def touch(self, world: World, held: Mapping[int, Held]) -> Change:
        thing = world.pick(world.things)
        value = self._rng.randrange(1, 2_000_000_000) * 1_000_000_000 + self._rng.randrange(1_000_000_000)
        return self._of_thing(world, Action(Kind.TOUCH, thing.path, value=value), thing)

    def set_xattr(self, world: World, held: Mapping[int, Held]) -> Change:
        thing = world.pick([*world.files, *world.folders])
        return self._of_thing(world, Action(Kind.SET_XATTR, thing.path, value=self.value()), thing)

    def unlink(self, world: World, held: Mapping[int, Held]) -> Change:
        if len(world.files) <= _FEWEST_FILES:
            raise LookupError
        return self._gone(world, world.pick([*world.files, *world.links]), Kind.UNLINK)

    def remove_folder(self, world: World, held: Mapping[int, Held]) -> Change:
        empty = [folder for folder in world.folders if world.is_empty(folder)]
        return self._gone(world, world.pick(empty), Kind.RMDIR)

    def make_folder(self, world: World, held: Mapping[int, Held]) -> Change:
        parent = world.folder()
        if parent.count("/") >= _DEEPEST - 1:
            raise LookupError
        path = world.free(parent)
        return Change([Action(Kind.MKDIR, path)], [path])

    def link(self, world: World, held: Mapping[int, Held]) -> Change:
        file, new = world.pick(world.files), world.free()
        names = [*world.aliases(file.inode), new]
        return Change([Action(Kind.LINK, file.path, new)], names, [file.inode])

    def symlink(self, world: World, held: Mapping[int, Held]) -> Change:
        if len(world.links) >= 4:
            raise LookupError
        path = world.free()
        return Change([Action(Kind.SYMLINK, path, f"target-{self.value():x}")], [path])

    def rename(self, world: World, held: Mapping[int, Held]) -> Change:
        """To a name that does not exist."""
        thing = world.pick([*world.files, *world.links])
        folder = world.folder() if self._across() else thing.folder
        return self._renamed(world, thing, world.free(folder), 0, [])

    def rename_over(self, world: World, held: Mapping[int, Held]) -> Change:
        things = [*world.files, *world.links]
        thing = world.pick(things)
        victim = self._partner(world, thing, things)
        if thing.inode == victim.inode:
            raise LookupError  # rename(2) does nothing then
        return self._renamed(world, thing, victim.path, 0, [victim])

    def exchange(self, world: World, held: Mapping[int, Held]) -> Change:
        one = world.pick(world.things)
        two = self._partner(world, one, world.things)
        if one.path.startswith(two.path) or two.path.startswith(one.path):
            raise LookupError
        return self._renamed(world, one, two.path, _RENAME_EXCHANGE, [two])

    def rename_folder(self, world: World, held: Mapping[int, Held]) -> Change:
        """With all that is in it."""
        folder = world.pick(world.folders)
        parent = world.folder() if self._across() else folder.folder
        if f"{parent}/".startswith(f"{folder.path}/") or parent.count("/") >= _DEEPEST - 1:
            raise LookupError
        return self._renamed(world, folder, world.free(parent), 0, [])

    def refused(self, world: World, held: Mapping[int, Held]) -> Change:
        """What must fail, and would not if the guest believed in a state that is over."""
        thing, absent = world.pick(world.things), world.free()
        action, error = self._rng.choice(
            [
                (Action(Kind.MKDIR, thing.path), errno.EEXIST),
                (Action(Kind.CREATE, thing.path), errno.EEXIST),
                (Action(Kind.UNLINK, absent), errno.ENOENT),
                (Action(Kind.RENAME, absent, thing.path), errno.ENOENT),
                (Action(Kind.CHMOD, absent, flags=0o700), errno.ENOENT),
            ]
        )
        return Change([action], [action.path], error=error)

    def _write(self, world: World, file: Thing, offset: int, length: int) -> Change:
        value = self.value()
        action = Action(Kind.WRITE, file.path, offset=offset, length=length, value=value)
        becomes = _patched(world.content(file.path), offset, contents(length, value))
        return self._of_inode(world, action, file.inode, becomes)

    def _of_inode(self, world: World, action: Action, inode: int, becomes: bytes) -> Change:
        names = world.aliases(inode)
        return Change([action], names, [inode], becomes=dict.fromkeys(names, becomes))

    def _of_thing(self, world: World, action: Action, thing: Thing) -> Change:
        return Change([action], world.aliases(thing.inode), [thing.inode])

    def _gone(self, world: World, thing: Thing, kind: Kind) -> Change:
        return Change([Action(kind, thing.path)], world.aliases(thing.inode), [thing.inode])

    def _renamed(self, world: World, thing: Thing, new: str, flags: int, victims: list[Thing]) -> Change:
        names = [thing.path, new]
        for moved in [thing, *victims]:
            names += world.aliases(moved.inode)
            below = [other.path.removeprefix(moved.path) for other in world.below(moved.path)]
            if below:
                inside = self._rng.choice(below)
                names += [thing.path + inside, new + inside]
        inodes = [thing.inode, *(victim.inode for victim in victims)]
        return Change([Action(Kind.RENAME, thing.path, new, flags=flags)], list(dict.fromkeys(names)), inodes)

    def _across(self) -> bool:
        """Whether to move something to another directory: Linux has one lock for all such moves in a file system, so
        each waits for those before it, which wait for leases."""
        return self._rng.random() < _ACROSS

    def _partner(self, world: World, thing: Thing, things: Sequence[Thing]) -> Thing:
        """Something to change places with."""
        across = self._across()
        return world.pick([other for other in things if across or other.folder == thing.folder])

    def _pick_held(self, held: Mapping[int, Held]) -> tuple[int, Held]:
        if not held:
            raise LookupError
        slot = self._rng.choice(sorted(held))
        return slot, held[slot]


def _patched(old: bytes, offset: int, data: bytes) -> bytes:
    if not data:
        return old
    return old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]


_Maker = Callable[[Generator, World, Mapping[int, Held]], Change]
_MAKERS: dict[_Maker, int] = {
    Generator.create: 12,
    Generator.overwrite: 6,
    Generator.overwrite_unseen: 6,
    Generator.write_somewhere: 5,
    Generator.write_held: 6,
    Generator.append: 5,
    Generator.replace_contents: 4,
    Generator.truncate: 4,
    Generator.truncate_held: 3,
    Generator.change_mode: 4,
    Generator.change_owner: 3,
    Generator.touch: 4,
    Generator.set_xattr: 3,
    Generator.unlink: 9,
    Generator.remove_folder: 3,
    Generator.make_folder: 3,
    Generator.link: 4,
    Generator.symlink: 2,
    Generator.rename: 7,
    Generator.rename_over: 5,
    Generator.exchange: 3,
    Generator.rename_folder: 3,
    Generator.refused: 3,
}
_NEED_LINKS = {
    Generator.change_mode,
    Generator.change_owner,
    Generator.set_xattr,
    Generator.link,
    Generator.symlink,
}
