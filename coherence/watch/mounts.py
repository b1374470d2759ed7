"""Mounts: what a name stands for changes with them, too, and neither inotify nor fanotify tells of that."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from pathlib import Path

from coherence.log import get_logger

log = get_logger(__name__)

MOUNT_TABLE = Path("/proc/self/mountinfo")


class Mounts:
    """Notices mounts and unmounts in this mount namespace.

    Args:
        devices: tells which devices (st_dev) matter now.
        changed: called when something was mounted on one of those, or one of those mounted or unmounted.
    """

    def __init__(self, devices: Callable[[], set[int]], changed: Callable[[], None]) -> None:
        self._devices = devices
        self._changed = changed
        self._table = os.open(MOUNT_TABLE, os.O_RDONLY | os.O_CLOEXEC)
        # The table is always readable; a change is an error condition, which only an epoll of its own can single out.
        self._epoll = select.epoll()
        self._epoll.register(self._table, select.EPOLLPRI)
        self._mounts = self._read()
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
        old, self._mounts = self._mounts, self._read()
        different = {
            number for number in old.keys() | self._mounts.keys() if old.get(number) != self._mounts.get(number)
        }
        devices = set()
        for mounts in (old, self._mounts):
            for number in different & mounts.keys():
                device, parent = mounts[number]
                devices.add(device)
                if parent in mounts:
                    devices.add(mounts[parent][0])
        if devices & self._devices():
            log.info("something was mounted or unmounted where directories are watched: nothing cached counts")
            self._changed()

    def _read(self) -> dict[int, tuple[int, int]]:
        """By mount id: device and the mount that it is on; proc(5)."""
        mounts = {}
        for line in MOUNT_TABLE.read_text(errors="surrogateescape").splitlines():
            number, parent, device = line.split(maxsplit=3)[:3]
            major, minor = device.split(":")
            mounts[int(number)] = os.makedev(int(major), int(minor)), int(parent)
        return mounts
