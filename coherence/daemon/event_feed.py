"""Change events for people: what the host watch sees is told to control clients that subscribed.

The host watch must not wait for anybody, so it only notes each change in a short list. A few times a second the
list is told to all subscribers; what one of them has no room for is counted and not kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from itertools import groupby

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.watch.invalidator import Domain, What
from coherent_vfs.coherence.protocol.connection import Connection, Dropped, Full
from coherent_vfs.coherence.protocol.messages import MAX_PATH, Change, Changes, FromClient

log = get_logger(__name__)

MAX_SUBSCRIBERS = 16
TELL_SECONDS = 0.05
# Changes that are noted between two tellings.
MAX_NOTED = 8192
# What is kept for a subscriber that does not read, and what goes into one packet (of at most MAX_BYTES).
MAX_KEPT_BYTES = 2097152
PACKET_BYTES = 32768
# What a change takes besides its path: names of guests have 64 characters at most, of up to 4 bytes.
CHANGE_BYTES = 320


class Subscriber:
    """A control client that is told of changes.

    Args:
        connection: which never waits.
        path: tell only what happens there or below; empty for everything.
        drop: called with the reason when the client cannot be told anything any more.
    """

    def __init__(self, connection: Connection[FromClient], path: bytes, drop: Callable[[str], None]) -> None:
        self._connection = connection
        self._path = path.rstrip(b"/")
        self._below = self._path + b"/"
        self.drop = drop
        self._kept: deque[Change] = deque()
        self._kept_bytes = 0
        self._missed = 0

    @property
    def behind(self) -> bool:
        """Whether there is something that it was not told yet."""
        return bool(self._kept or self._missed)

    def add(self, changes: list[Change], missed: int) -> None:
        """Keep what it is to be told, as far as there is room.

        Args:
            changes: in their order.
            missed: how many there were after them that nobody knows any more.
        """
        for change in changes:
            if change.path != self._path and not change.path.startswith(self._below):
                continue
            short = cut(change)
            # Once something was missed nothing may come after it before that is told.
            if self._missed or self._kept_bytes + size(short) > MAX_KEPT_BYTES:
                self._missed += change.times
            else:
                self._kept.append(short)
                self._kept_bytes += size(short)
        self._missed += missed

    def tell(self) -> None:
        """Send what is kept, as much as the client's queue takes. Dropped when it is gone."""
        while self.behind:
            packet: list[Change] = []
            packet_bytes = 0
            for change in self._kept:
                packet_bytes += size(change)
                if packet_bytes > PACKET_BYTES:
                    break
                packet.append(change)
            last = len(packet) == len(self._kept)
            try:
                self._connection.send(Changes(packet, self._missed if last else 0))
            except Full:
                return
            for change in packet:
                self._kept.popleft()
                self._kept_bytes -= size(change)
            if last:
                self._missed = 0


class ChangeEvents:
    """The subscribers of one domain. While there are none, nothing is noted.

    Args:
        domain: whose changes they want to know.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._subscribers: list[Subscriber] = []
        self._noted: list[tuple[float, str, What, bytes]] = []
        self._missed = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, subscriber: Subscriber) -> None:
        """Tell it of changes from now on. UserError when there are too many subscribers."""
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            raise UserError(f"{MAX_SUBSCRIBERS} clients watch changes already: end one of them")
        # What was noted before is for the others.
        self._tell()
        self._subscribers.append(subscriber)
        self._domain.on_change = self._note

    def remove(self, subscriber: Subscriber) -> None:
        """Tell it nothing any more."""
        self._subscribers.remove(subscriber)
        if not self._subscribers:
            self._domain.on_change = None
            self._noted.clear()
            self._missed = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _note(self, who: str, what: What, path: bytes) -> None:
        if len(self._noted) >= MAX_NOTED:
            self._missed += 1
            return
        self._noted.append((time.time(), who, what, path))
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changes, missed = merged(self._noted), self._missed
        self._noted.clear()
        self._missed = 0
        for subscriber in list(self._subscribers):
            subscriber.add(changes, missed)
            try:
                subscriber.tell()
            except Dropped as error:
                subscriber.drop(str(error))
        if any(subscriber.behind for subscriber in self._subscribers):
            self._schedule()


def merged(noted: list[tuple[float, str, What, bytes]]) -> list[Change]:
    """Changes in their order, equal ones that follow each other as one."""
    changes = []
    for _, equal in groupby(noted, lambda one: one[1:]):
        first, *more = equal
        changes.append(Change(*first, 1 + len(more)))
    return changes


def size(change: Change) -> int:
    """What a change takes in a packet, bytes, at most."""
    return CHANGE_BYTES + len(change.path)


def cut(change: Change) -> Change:
    """The change with a path that is not too long for a packet."""
    if len(change.path) <= MAX_PATH:
        return change
    return Change(change.time, change.who, change.what, b"..." + change.path[3 - MAX_PATH :], change.times)
