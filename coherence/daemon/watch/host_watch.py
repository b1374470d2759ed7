"""A host watch, whatever it is made of."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from coherent_vfs.coherence.daemon.watch.fanotify import FanotifyWatch
from coherent_vfs.coherence.daemon.watch.inotify import InotifyWatch
from coherent_vfs.coherence.daemon.watch.invalidator import Domain

Kind = Literal["inotify", "fanotify", "none"]


class HostWatch(Protocol):
    """Bumps what changes on the host. Keys are the caller's names of backends."""

    @property
    def kind(self) -> Kind:
        """How it watches."""

    @property
    def watches(self) -> int:
        """How much is watched."""

    @property
    def limit(self) -> int:
        """How much can be."""

    @property
    def first(self) -> tuple[int, Callable[[], object]] | None:
        """Its descriptor and what serves that, for a FirstSelector; an ordinary loop serves it, too, but later."""

    def devices(self) -> set[int]:
        """On which devices (st_dev) something is watched."""

    def watched(self, identity: tuple[int, int]) -> bool:
        """Whether a directory, st_dev and st_ino, is watched for a backend."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """See changes from now on."""

    def join(self, key: int, backend_id: int, guest: str, journal: Path, pid: int) -> None:
        """Tell apart the changes of a backend that has become a member (InotifyWatch.join)."""

    def leave(self, key: int) -> None:
        """The backend's connection is over."""

    def watch(self, key: int, fd: int) -> bool:
        """Watch what this O_PATH descriptor, which is taken over, is of; whether it is watched from now on."""

    def unwatch(self, key: int) -> None:
        """The backend's guest has gone: it relies on nothing."""

    def close(self) -> None:
        """Watch nothing any more."""


class NoWatch:
    """Sees nothing: guests cache nothing of which a change on the host would have to be told."""

    kind: Kind = "none"
    watches = 0
    limit = 0
    first: None = None

    def devices(self) -> set[int]:
        """None."""
        return set()

    def watched(self, identity: tuple[int, int]) -> bool:
        """No."""
        return False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing."""

    def join(self, key: int, backend_id: int, guest: str, journal: Path, pid: int) -> None:
        """Nothing."""

    def leave(self, key: int) -> None:
        """Nothing."""

    def watch(self, key: int, fd: int) -> bool:
        """Never."""
        os.close(fd)
        return False

    def unwatch(self, key: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_watch(kind: Kind, domain: Domain, limit: int | None) -> HostWatch:
    """The host watch that the settings ask for. UserError when the system does not give it."""
    # Until something is watched by inotify; an earlier daemon may have left it otherwise.
    domain.leases.want_markers(False)
    if kind == "none":
        return NoWatch()
    return FanotifyWatch(domain, limit) if kind == "fanotify" else InotifyWatch(domain, limit)
