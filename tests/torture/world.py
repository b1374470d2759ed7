"""What there is in a context's part of the share, as the host sees it: what a random change is chosen from."""

from __future__ import annotations

import dataclasses
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

_NAMES = 7
"""Names that are used in each directory, whatever their type: they come to be, go, and come again as something else."""


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """A name that exists, with its status as lstat(2) has it."""

    path: str
    status: os.stat_result

    @property
    def inode(self) -> int:
        return self.status.st_ino

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def size(self) -> int:
        return self.status.st_size


class World:
    """All names below a directory of the share at one moment.

    Args:
        share: The shared directory.
        root: The context's directory, relative to it.
        rng: Decides what is picked.
    """

    def __init__(self, share: Path, root: str, rng: random.Random) -> None:
        self._share = str(share)
        self._rng = rng
        self.root = root
        self.things = sorted(self._scan(root), key=lambda thing: thing.path)
        self.files = self._of_type(stat.S_ISREG)
        self.folders = self._of_type(stat.S_ISDIR)
        self.links = self._of_type(stat.S_ISLNK)
        self._taken = {thing.path for thing in self.things}

    def pick(self, things: list[Thing]) -> Thing:
        """One of them. LookupError when there is none."""
        if not things:
            raise LookupError
        return self._rng.choice(things)

    def folder(self) -> str:
        """Path of some directory, the root included."""
        return self._rng.choice([self.root, *(folder.path for folder in self.folders)])

    def free(self, folder: str | None = None) -> str:
        """A name that does not exist. LookupError when the directory is full."""
        folder = folder or self.folder()
        free = [path for path in self.names_in(folder) if path not in self._taken]
        if not free:
            raise LookupError
        return self._rng.choice(free)

    def names_in(self, folder: str) -> list[str]:
        """All names that may come to be in a directory."""
        return [f"{folder}/{chr(ord('a') + number)}" for number in range(_NAMES)]

    def is_empty(self, folder: Thing) -> bool:
        """Whether a directory has nothing in it."""
        return not any(thing.path.startswith(f"{folder.path}/") for thing in self.things)

    def below(self, folder: str) -> list[Thing]:
        """Everything in a directory's subtree."""
        return [thing for thing in self.things if thing.path.startswith(f"{folder}/")]

    def aliases(self, inode: int) -> list[str]:
        """The names of an inode."""
        return [thing.path for thing in self.things if thing.inode == inode]

    def content(self, path: str) -> bytes:
        """A file's contents."""
        return Path(self._share, path).read_bytes()

    def _of_type(self, is_type: Callable[[int], bool]) -> list[Thing]:
        return [thing for thing in self.things if is_type(thing.status.st_mode)]

    def _scan(self, folder: str) -> Iterator[Thing]:
        with os.scandir(f"{self._share}/{folder}") as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                yield Thing(path, entry.stat(follow_symlinks=False))
                if entry.is_dir(follow_symlinks=False):
                    yield from self._scan(path)
