"""Mounts: what a name stands for changes with them, too, and neither inotify nor fanotify tells of that."""

from __future__ import annotations

import asyncio
import os
import re
import select
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coherent_vfs.coherence.common.log import get_logger

log = get_logger(__name__)

MOUNT_TABLE = Path("/proc/self/mountinfo")


class Watch(Protocol):
    """What is watched (HostWatch)."""

    def devices(self) -> set[int]:
        """On which devices (st_dev) something is watched."""

    def watched(self, identity: tuple[int, int]) -> bool:
        """Whether a directory, st_dev and st_ino, is watched."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table.

    Args:
        number: the mount's id.
        parent: id of the mount that it is on.
        device: st_dev of what is mounted.
        point: where, in this process's mount namespace.
    """

    number: int
    parent: int
    device: int
    point: bytes


class Mounts:
    """Notices mounts and unmounts in this mount namespace.

    A mount changes what one name stands for: the mount point's, in its directory. It matters if a guest may have that
    name cached, and then the directory is watched. A mount at, above or below a share counts always.

    Args:
        watch: what is watched.
        shares: descriptors of the shares' directories.
        changed: called when something was mounted or unmounted, unless it is proved that this does not matter.
    """

    def __init__(self, watch: Watch, shares: Callable[[], Iterable[int]], changed: Callable[[], None]) -> None:
        self._watch = watch
        self._shares = shares
        self._changed = changed
        self._table = os.open(MOUNT_TABLE, os.O_RDONLY | os.O_CLOEXEC)
        # The table is always readable; a change is an error condition, which only an epoll of its own can single out.
        self._epoll = select.epoll()
        self._epoll.register(self._table, select.EPOLLPRI)
        self._mounts = _read()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look from now on."""
        self._loop = loop
        loop.add_reader(self._epoll.fileno(), self.process)

    def close(self) -> None:
        """Look no more."""
        if self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._table)

    def process(self) -> None:
        """See what has changed."""
        self._epoll.poll(0)
        old, self._mounts = self._mounts, _read()
        devices = self._watch.devices()
        if not devices:
            return
        shares = [os.fsencode(Path(f"/proc/self/fd/{fd}").readlink()) for fd in self._shares()]
        for mounts, others in ((old, self._mounts), (self._mounts, old)):
            for number, mount in mounts.items():
                if others.get(number) == mount or not self._matters(mount, mounts, shares, devices):
                    continue
                log.info(
                    "something was mounted or unmounted where directories are watched: nothing cached counts",
                    at=os.fsdecode(mount.point),
                )
                self._changed()
                return

    def _matters(self, mount: Mount, mounts: dict[int, Mount], shares: list[bytes], devices: set[int]) -> bool:
        if any(_is_in(mount.point, share) or _is_in(share, mount.point) for share in shares):
            return True
        base = mounts.get(mount.parent)
        while base is not None and base.point == mount.point:
            # Mounted over another mount: the name is in the directory that both are in.
            base = mounts.get(base.parent)
        if base is None:
            return True
        return base.device in devices and not self._is_beside(mount.point, base)

    def _is_beside(self, point: bytes, base: Mount) -> bool:
        """Whether it is proved that nobody watches the directory that a mount point on this mount is in."""
        try:
            directory = os.open(point.rpartition(b"/")[0] or b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            # Another mount may cover the directory, and may have done so from the beginning.
            if _mount_of(directory) != base.number:
                return False
            # By what it is, not by its path: it may be watched where another mount, or namespace, has it.
            status = os.fstat(directory)
            return not self._watch.watched((status.st_dev, status.st_ino))
        finally:
            os.close(directory)


def _read() -> dict[int, Mount]:
    """All mounts by id; proc(5)."""
    mounts = {}
    for line in MOUNT_TABLE.read_bytes().rstrip(b"\n").split(b"\n"):
        number, parent, device, _, point = line.split(b" ", 5)[:5]
        major, minor = device.split(b":")
        # Blanks and backslashes are written in octal.
        path = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), point)
        mounts[int(number)] = Mount(int(number), int(parent), os.makedev(int(major), int(minor)), path)
    return mounts


def _mount_of(fd: int) -> int:
    """The id of the mount that a descriptor is on; proc(5)."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise AssertionError("the kernel tells no mount of a descriptor")


def _is_in(path: bytes, directory: bytes) -> bool:
    """Whether a path is this directory's or below it."""
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")
