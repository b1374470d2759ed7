"""The host watch by fanotify: whole file systems, and the kernel tells which process made a change.

A change of a backend is known by its process, so no markers are needed, and there is no limit of watches. What
happens elsewhere on the file system is bumped, too: what of it a guest has cached is not known here.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.watch import fanotify_calls as calls
from coherent_vfs.coherence.daemon.watch.inotify import InotifyWatch
from coherent_vfs.coherence.daemon.watch.invalidator import HOST, Domain, What

log = get_logger(__name__)

SELF = b"."
NAMES = calls.FAN_CREATE | calls.FAN_DELETE | calls.FAN_RENAME
WHAT: dict[int, What] = {
    calls.FAN_CREATE: "create",
    calls.FAN_DELETE: "delete",
    calls.FAN_MODIFY: "modify",
    calls.FAN_ATTRIB: "attrib",
}
# A handle names one inode for ever, so what was found out once stays true.
KEPT_HANDLES = 65536
# How long, and how often, an inode number may be on its way to a new inode.
REUSED_SECONDS = 0.1
REUSED_AGAIN_SECONDS = 0.0002


@dataclass(slots=True, eq=False)
class FileSystem:
    """A file system that is watched.

    Args:
        device: its st_dev.
        fd: a descriptor on it, by which handles are opened.
        asked_by: keys of the backends that rely on it.
    """

    device: int
    fd: int
    asked_by: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Member:
    """A backend: what InotifyWatch.join needs to know, should a file system need that."""

    backend_id: int
    guest: str
    journal: Path
    pid: int


class FanotifyWatch:
    """Watches every file system that a backend asks for; one that cannot be watched so is left to inotify.

    Args:
        domain: to tell.
        limit: how many inotify watches at most, should they be needed.

    Raises:
        UserError: the kernel does not have or does not permit it.
    """

    kind: Literal["fanotify"] = "fanotify"

    def __init__(self, domain: Domain, limit: int | None = None) -> None:
        self._domain = domain
        self._inotify_limit = limit
        self._inotify: InotifyWatch | None = None
        self._group = _open_group()
        self._members: dict[int, Member] = {}
        self._guests: dict[int, str] = {}
        self._systems: dict[int, FileSystem] = {}
        self._by_device: dict[int, FileSystem] = {}
        self._left_to_inotify: set[int] = set()
        # Directories and files that backends have asked for: what happens elsewhere is nothing to tell people.
        self._asked: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
        self._identities: dict[calls.Handle, tuple[int, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watches(self) -> int:
        """How many file systems are watched, and directories on others."""
        return len(self._systems) + (self._inotify.watches if self._inotify is not None else 0)

    @property
    def limit(self) -> int:
        """There is none for file systems; that of inotify watches, where they are needed."""
        return self._inotify.limit if self._inotify is not None else 0

    def devices(self) -> set[int]:
        """On which devices something is watched."""
        return self._by_device.keys() | (self._inotify.devices() if self._inotify is not None else set())

    def watched(self, identity: tuple[int, int]) -> bool:
        """Whether a backend has asked for this directory, st_dev and st_ino."""
        if any(identity in asked for asked in self._asked.values()):
            return True
        return self._inotify is not None and self._inotify.watched(identity)

    @property
    def first(self) -> tuple[int, Callable[[], object]]:
        """The queue, and what serves it (HostWatch)."""
        return self._group, self.process

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read events in this loop from now on."""
        self._loop = loop
        loop.add_reader(self._group, self.process)

    def close(self) -> None:
        """Watch nothing any more."""
        if self._loop is not None:
            self._loop.remove_reader(self._group)
        if self._inotify is not None:
            self._inotify.close()
        for system in self._systems.values():
            os.close(system.fd)
        os.close(self._group)

    # --- backends -------------------------------------------------------------------------------------------

    def join(self, key: int, backend_id: int, guest: str, journal: Path, pid: int) -> None:
        """Tell apart the changes of a backend that has become a member; see InotifyWatch.join.

        Args:
            key, backend_id, guest, journal: as there.
            pid: its process.
        """
        self._members[key] = Member(backend_id, guest, journal, pid)
        self._guests[pid] = guest
        if self._inotify is not None:
            self._inotify.join(key, backend_id, guest, journal, pid)

    def leave(self, key: int) -> None:
        """The backend's connection is over."""
        member = self._members.pop(key, None)
        if member is not None:
            self._guests.pop(member.pid, None)
        if self._inotify is not None:
            self._inotify.leave(key)
        self.unwatch(key)

    def unwatch(self, key: int) -> None:
        """The backend's guest has gone, so it relies on nothing; see InotifyWatch.unwatch."""
        self._asked.pop(key, None)
        if self._inotify is not None:
            self._inotify.unwatch(key)
        for fsid, system in list(self._systems.items()):
            system.asked_by.discard(key)
            if not system.asked_by:
                self._let_go(fsid, system)

    def watch(self, key: int, fd: int) -> bool:
        """Watch what this O_PATH descriptor, which is taken over, is of; whether it is watched from now on."""
        try:
            status = os.fstat(fd)
            system = self._by_device.get(status.st_dev)
            if system is None and status.st_dev not in self._left_to_inotify:
                system = self._add(fd, status)
        except OSError:
            os.close(fd)
            self._domain.counts.refused += 1
            return False
        if system is None:
            return self._other().watch(key, fd)
        os.close(fd)
        system.asked_by.add(key)
        self._asked[key].add((status.st_dev, status.st_ino))
        return True

    def _add(self, fd: int, status: os.stat_result) -> FileSystem | None:
        if not stat.S_ISDIR(status.st_mode):
            # Its directory was asked for first.
            return None
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fsid = calls.file_system_id(own)
            calls.mark(self._group, own)
        except OSError as error:
            os.close(own)
            self._left_to_inotify.add(status.st_dev)
            log.warning(
                "fanotify cannot watch a file system: inotify watches its directories",
                device=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
                reason=error.strerror,
            )
            return None
        system = FileSystem(status.st_dev, own)
        self._systems[fsid] = self._by_device[status.st_dev] = system
        return system

    def _let_go(self, fsid: int, system: FileSystem) -> None:
        calls.unmark(self._group, system.fd)
        os.close(system.fd)
        del self._systems[fsid], self._by_device[system.device]
        self._identities = {handle: found for handle, found in self._identities.items() if handle.fsid != fsid}

    def _other(self) -> InotifyWatch:
        if self._inotify is None:
            self._inotify = InotifyWatch(self._domain, self._inotify_limit)
            for key, member in self._members.items():
                self._inotify.join(key, member.backend_id, member.guest, member.journal, member.pid)
            if self._loop is not None:
                self._inotify.start(self._loop)
        return self._inotify

    # --- events ---------------------------------------------------------------------------------------------

    def process(self) -> None:
        """Read some of what has happened, and bump what no backend bumps."""
        counts = self._domain.counts
        names: dict[tuple[int, bytes], None] = {}
        inodes: dict[int, bool] = {}
        for event in calls.read(self._group):
            if event.mask & calls.FAN_Q_OVERFLOW:
                log.info("fanotify has lost events: nothing cached counts")
                counts.overflows += 1
                self._domain.raise_floor("overflow")
                continue
            counts.events += 1
            guest = self._guests.get(event.pid)
            if guest is None:
                counts.bumped += 1
                self._collect(event, names, inodes)
            else:
                counts.own += 1
            if self._domain.on_change is not None:
                self._tell(event, HOST if guest is None else guest)
        self._domain.bump(names, inodes)

    def _collect(self, event: calls.Event, names: dict[tuple[int, bytes], None], inodes: dict[int, bool]) -> None:
        for handle, name in event.places:
            directory = self._slot(handle)
            if directory is None:
                continue
            if name == SELF:
                inodes.setdefault(directory, False)
            elif event.mask & NAMES:
                names[directory, name] = None
                inodes[directory] = True
        inode = self._slot(event.inode) if event.inode is not None else None
        if inode is not None:
            inodes[inode] = inodes.get(inode, False) or event.mask & calls.FAN_MODIFY != 0

    def _slot(self, handle: calls.Handle) -> int | None:
        identity = self._identity(handle)
        return None if identity is None else self._domain.table.inode_slot(*identity)

    def _identity(self, handle: calls.Handle) -> tuple[int, int] | None:
        """Device and inode number of a handle; None when the inode is gone, so that nobody has it."""
        identity = self._identities.get(handle)
        if identity is not None:
            return identity
        system = self._systems.get(handle.fsid)
        if system is None:
            return None
        try:
            fd = _open(system, handle)
        except OSError as error:
            if error.errno != errno.ESTALE:
                log.warning("what has changed cannot be looked up: nothing cached counts", reason=error.strerror)
                self._domain.raise_floor("unknown")
            return None
        status = os.fstat(fd)
        identity = status.st_dev, status.st_ino
        os.close(fd)
        if len(self._identities) >= KEPT_HANDLES:
            self._identities.clear()
        self._identities[handle] = identity
        return identity

    def _tell(self, event: calls.Event, who: str) -> None:
        assert self._domain.on_change is not None
        whats: list[What] = [what for bit, what in WHAT.items() if event.mask & bit]
        if event.mask & calls.FAN_RENAME:
            whats = ["move from", "move to"]
        for number, (handle, name) in enumerate(event.places):
            identity = self._identity(handle)
            path = self._path(handle)
            if path is None or identity is None or not self.watched(identity):
                continue
            for what in whats[number : number + 1] if event.mask & calls.FAN_RENAME else whats:
                self._domain.on_change(who, what, path if name == SELF else path.rstrip(b"/") + b"/" + name)

    def _path(self, handle: calls.Handle) -> bytes | None:
        system = self._systems.get(handle.fsid)
        if system is None:
            return None
        try:
            fd = _open(system, handle)
        except OSError:
            return None
        try:
            return os.fsencode(Path(f"/proc/self/fd/{fd}").readlink())
        finally:
            os.close(fd)


def _open(system: FileSystem, handle: calls.Handle) -> int:
    """As calls.open_handle(); ENOMEM only when there is no memory.

    While the number of an inode that is gone is being given to a new one, ext4 and others say ENOMEM, and right after
    it ESTALE: iget_locked() in the kernel's fs/inode.c finds an inode with I_CREATING.
    """
    end = time.monotonic() + REUSED_SECONDS
    while True:
        try:
            return calls.open_handle(system.fd, handle)
        except OSError as error:
            if error.errno != errno.ENOMEM or time.monotonic() > end:
                raise
        time.sleep(REUSED_AGAIN_SECONDS)


def _open_group() -> int:
    """A group's descriptor. UserError when this process may not have one, or could not use it."""
    try:
        group = calls.open_group()
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UserError(
                "--watch fanotify needs CAP_SYS_ADMIN: run coherenced as root with it, or use --watch inotify"
            ) from None
        raise UserError(f"fanotify: {error.strerror}: use Linux 5.17 or later, or --watch inotify") from None
    if not calls.may_open_handles():
        os.close(group)
        raise UserError("--watch fanotify needs CAP_DAC_READ_SEARCH: give it to coherenced, or use --watch inotify")
    return group
