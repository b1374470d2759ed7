"""A change that a second guest watches for while it is being made, so as to ask a third one at once."""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.torture.actions import Action, Field, Kind, Watch
from tests.torture.world import World

WATCH_SECONDS = 5.0
"""How long the second guest watches: longer than any lease."""


class Race(NamedTuple):
    """A change by one system call, and one field of one observation that it alters at one stroke."""

    action: Action
    look: Action
    field: Field

    def watch(self, old: int) -> Watch:
        """What the second guest does."""
        return Watch(self.look, self.field, old, int(1000 * WATCH_SECONDS))


def choose(world: World, rng: random.Random, value: int) -> Race:
    """A race that is possible in this world. LookupError when the kind that was drawn is not."""
    kind = rng.choice([Kind.WRITE, Kind.CHMOD, Kind.TRUNCATE, Kind.RENAME, Kind.UNLINK, Kind.MKDIR, Kind.LINK])
    if kind is Kind.MKDIR:
        path = world.free()
        return Race(Action(kind, path), Action(Kind.LSTAT, path), Field.ERROR)
    thing = world.pick([file for file in world.files if file.size > 8])
    status = Action(Kind.LSTAT, thing.path)
    if kind is Kind.WRITE:
        # 8 bytes: a reader sees all of them or none.
        content = Action(rng.choice([Kind.OPEN, Kind.MAP]), thing.path)
        return Race(Action(kind, thing.path, length=8, value=value), content, Field.CONTENT)
    if kind is Kind.CHMOD:
        return Race(Action(kind, thing.path, flags=thing.status.st_mode & 0o777 ^ 0o022), status, Field.MODE)
    if kind is Kind.TRUNCATE:
        return Race(Action(kind, thing.path, length=thing.size - 1), status, Field.SIZE)
    if kind is Kind.UNLINK:
        return Race(Action(kind, thing.path), Action(rng.choice([Kind.LSTAT, Kind.OPEN]), thing.path), Field.ERROR)
    if kind is Kind.LINK:
        new = world.free()
        return Race(Action(kind, thing.path, new), Action(Kind.LSTAT, new), Field.ERROR)
    other = world.pick(world.files)
    if other.inode == thing.inode:
        raise LookupError
    over = rng.random() < 0.5
    new = other.path if over else world.free(thing.folder)
    return Race(Action(kind, thing.path, new), Action(Kind.LSTAT, new), Field.INODE if over else Field.ERROR)
