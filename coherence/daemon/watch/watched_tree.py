"""Which directories, and files with several links, are watched, for whom, and where they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True, eq=False)
class Watched:
    """A watched inode.

    Args:
        wd: its watch descriptor.
        fd: an O_PATH descriptor of it. It keeps the inode number from being used again.
        identity: st_dev and st_ino.
        slot: its inode slot.
        is_directory: whether it is one.
        path: where it was when it was found. Good as long as it has no parent here.
        parent, name: the watched directory that it is in, and its name there.
        children: watched directories in this one, by name.
        asked_by: keys of the backends that rely on it.
    """

    wd: int
    fd: int
    identity: tuple[int, int]
    slot: int
    is_directory: bool
    path: bytes
    parent: Watched | None = None
    name: bytes = b""
    children: dict[bytes, Watched] = field(default_factory=dict)
    asked_by: set[int] = field(default_factory=set)

    def full_path(self) -> bytes:
        """Where it is, as far as renames inside the watched area tell; in the mount namespace of its backend."""
        names: list[bytes] = []
        here = self
        while here.parent is not None:
            names.append(here.name)
            here = here.parent
        return b"/".join([here.path.rstrip(b"/") if names else here.path, *reversed(names)])

    def path_of(self, name: bytes) -> bytes:
        """Where this name in it is; its own path where that is empty."""
        path = self.full_path()
        return path.rstrip(b"/") + b"/" + name if name else path

    def removed(self) -> bool:
        """Whether it has no name any more."""
        return os.fstat(self.fd).st_nlink == 0


class Tree:
    """All watched inodes. It owns their descriptors.

    Args:
        displaced: called with what had a name that another has now, although nothing told of its end there.
    """

    def __init__(self, displaced: Callable[[Watched], None]) -> None:
        self._displaced = displaced
        self.by_wd: dict[int, Watched] = {}
        self.by_identity: dict[tuple[int, int], Watched] = {}

    def __len__(self) -> int:
        return len(self.by_wd)

    def add(self, wd: int, fd: int, status: os.stat_result, slot: int) -> Watched:
        """Note a new watch; fd is this tree's from now on."""
        identity = status.st_dev, status.st_ino
        watched = Watched(wd, fd, identity, slot, stat.S_ISDIR(status.st_mode), _path(fd))
        self.by_wd[wd] = watched
        self.by_identity[identity] = watched
        self.place(watched)
        return watched

    def place(self, watched: Watched) -> None:
        """Find out anew where it is."""
        self.detach(watched)
        if not watched.is_directory:
            return
        try:
            above = os.stat("..", dir_fd=watched.fd)
        except OSError:
            return
        parent = self.by_identity.get((above.st_dev, above.st_ino))
        name = watched.path.rpartition(b"/")[2]
        if parent is not None and parent is not watched and name:
            self.attach(watched, parent, name)

    def attach(self, watched: Watched, parent: Watched, name: bytes) -> None:
        """It is in this directory under this name now."""
        self._leave_parent(watched)
        watched.parent, watched.name = parent, name
        older = parent.children.get(name)
        parent.children[name] = watched
        if older is not None:
            self.detach(older)
            self._displaced(older)

    def detach(self, watched: Watched) -> None:
        """It is not in a watched directory any more."""
        self._leave_parent(watched)
        watched.parent = None
        watched.path = _path(watched.fd)

    def remove(self, watched: Watched) -> None:
        """Forget it and close its descriptor."""
        del self.by_wd[watched.wd]
        if self.by_identity.get(watched.identity) is watched:
            del self.by_identity[watched.identity]
        self._leave_parent(watched)
        os.close(watched.fd)

    def close(self) -> None:
        """Forget all."""
        for watched in list(self.by_wd.values()):
            self.remove(watched)

    @staticmethod
    def _leave_parent(watched: Watched) -> None:
        if watched.parent is not None and watched.parent.children.get(watched.name) is watched:
            del watched.parent.children[watched.name]


def _path(fd: int) -> bytes:
    return os.fsencode(Path(f"/proc/self/fd/{fd}").readlink())
