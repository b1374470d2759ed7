"""The host watch by inotify: directories are watched when a backend asks for it, before it relies on that."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import stat
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from inotify_simple import INotify, flags  # type: ignore[import-untyped]

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.watch.attribution import Attribution, Member
from coherent_vfs.coherence.daemon.watch.invalidator import HOST, Domain, What
from coherent_vfs.coherence.daemon.watch.reader import Event, Queue
from coherent_vfs.coherence.daemon.watch.watched_tree import Tree, Watched
from coherent_vfs.coherence.shm.paths import open_file

log = get_logger(__name__)

WHAT: dict[int, What] = {
    int(flags.CREATE): "create",
    int(flags.DELETE): "delete",
    int(flags.MODIFY): "modify",
    int(flags.ATTRIB): "attrib",
    int(flags.MOVED_FROM): "move from",
    int(flags.MOVED_TO): "move to",
    int(flags.MOVE_SELF): "attrib",
}
CHANGES = sum(WHAT)
MASK = CHANGES | int(flags.EXCL_UNLINK)
APPEARS = int(flags.CREATE | flags.MOVED_TO)
RENAMES = int(APPEARS | flags.DELETE | flags.MOVED_FROM)
MODIFY = int(flags.MODIFY)
MOVED_FROM, MOVED_TO = int(flags.MOVED_FROM), int(flags.MOVED_TO)
ISDIR = int(flags.ISDIR)
Q_OVERFLOW, IGNORED, UNMOUNT = int(flags.Q_OVERFLOW), int(flags.IGNORED), int(flags.UNMOUNT)

# How long a change waits for a lock on its slots to end, or for a marker, to be seen as that backend's; then it is
# bumped.
LOCK_SECONDS = 0.01
# How long a name that was moved away may take to turn up in another watched directory.
MOVE_SECONDS = 0.002
# How long the queue is left alone where backends make changes, which are in it, too. Else each of their changes would
# wake this process, which costs them more than all the rest.
REST_SECONDS = 0.004
# Removing the watches of a backend that has gone takes time: so many between two turns of the loop.
REMOVED_AT_ONCE = 256
# Each watch is looked at once in so long, should the events have been too fast to tell that its inode was removed; some
# at a time.
ALL_SWEPT_SECONDS = 60.0
SWEEP_SECONDS = 1.0
SWEPT_AT_ONCE = 256
# Descriptors that are left for everything but watches.
OTHER_DESCRIPTORS = 4096
MAX_USER_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")


@dataclass(slots=True, eq=False)
class Change:
    """What an event, or several equal ones, told.

    Args:
        watched: where.
        name: in that directory; empty for the watched inode itself.
        mask: of the event.
        position, batch: of the last of the events: where it was in the queue, and with which others it was read.
        since: when the first was read, monotonic.
        inodes: slots to bump, with whether a file's data or a directory's list has changed.
        name_slot: of the name, where what it stands for has changed.
        looked_up: whether the inode that has the name now is in inodes.
        slots: all of these, once it is looked up.
    """

    watched: Watched
    name: bytes
    mask: int
    position: int
    batch: int
    since: float
    inodes: dict[int, bool]
    name_slot: int | None
    looked_up: bool = False
    slots: list[int] = field(default_factory=list)


class InotifyWatch:
    """Watches, and bumps what changes on the host.

    Args:
        domain: to tell.
        limit: how many watches at most, None for as many as the system allows.

    Raises:
        UserError: the system gives no inotify instance.
    """

    kind: Literal["inotify"] = "inotify"

    def __init__(self, domain: Domain, limit: int | None = None) -> None:
        self._domain = domain
        self.limit = min(limit or _system_limit(), _descriptor_limit())
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            raise UserError(
                f"inotify: {error.strerror}: raise fs.inotify.max_user_instances, or use --watch none"
            ) from None
        self._fd = self._inotify.fileno()
        self._tree = Tree(self._look_after)
        self._attribution = Attribution(domain.leases)
        self._queue = Queue(
            self._fd,
            domain,
            self._tree.by_wd,
            self._attribution.backend_ids,
            self._tell_of_write,
            lambda: self._go_on(None),
        )
        self._members: dict[int, Member] = {}
        self._journals: dict[int, Member] = {}
        self._asked: defaultdict[int, set[Watched]] = defaultdict(set)
        self._unused: deque[Watched] = deque()
        # What the sweep of all watches has not looked at yet.
        self._unswept: deque[Watched] = deque()
        # Watch descriptors that were removed here, until the kernel's last event of them has been read.
        self._ended: set[int] = set()
        self._batch = 0
        self._changes: dict[tuple[int, int, int, bytes], Change] = {}
        # By cookie: what was moved away, until when it may turn up; the directory it was in; itself, if it is watched.
        self._moving: dict[int, tuple[float, Watched, Watched | None]] = {}
        self._reported: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._again: asyncio.Handle | None = None
        self._sweeping: asyncio.Handle | None = None
        self._listens = False
        # Whether backends had a hand in what was read last.
        self._shared = False

    @property
    def watches(self) -> int:
        """How many directories and files are watched."""
        return len(self._tree)

    def devices(self) -> set[int]:
        """On which devices something is watched."""
        return {device for device, _ in self._tree.by_identity}

    def watched(self, identity: tuple[int, int]) -> bool:
        """Whether a directory, st_dev and st_ino, is watched."""
        return identity in self._tree.by_identity

    @property
    def busy(self) -> bool:
        """Whether something that was read is not told yet."""
        return bool(self._changes or self._moving)

    @property
    def first(self) -> tuple[int, Callable[[], object]]:
        """The queue, and what serves it (HostWatch)."""
        return self._fd, self._queue.serve

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read events in this loop from now on."""
        self._loop = loop
        self._listen(True)
        self._sweeping = loop.call_later(SWEEP_SECONDS, self._sweep_again)

    def close(self) -> None:
        """Watch nothing any more."""
        self._listen(False)
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._again is not None:
            self._again.cancel()
        for key in list(self._members):
            os.close(self._members.pop(key).journal)
        self._tree.close()
        self._inotify.close()

    # --- backends -------------------------------------------------------------------------------------------

    def join(self, key: int, backend_id: int, guest: str, journal: Path, pid: int) -> None:
        """Tell apart the changes of a backend that has become a member.

        Args:
            key: by which the caller knows it.
            backend_id: its number in the lease table.
            guest: what people call its guest.
            journal: the file of its journal.
            pid: its process; inotify does not tell processes.
        """
        try:
            fd = open_file(journal, os.O_RDONLY)
            member = self._members[key] = Member(backend_id, guest, fd)
            wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", flags.MODIFY)
        except OSError as error:
            self._warn("changes of a backend cannot be told from those of the host", error)
            return
        self._journals[wd] = member
        self._attribution.add(member)

    def leave(self, key: int) -> None:
        """The backend's connection is over: nobody watches for it any more."""
        member = self._members.pop(key, None)
        if member is not None:
            for wd in [wd for wd, one in self._journals.items() if one is member]:
                del self._journals[wd]
                self._remove_watch(wd)
            self._attribution.remove(member)
            os.close(member.journal)
        self.unwatch(key)

    def unwatch(self, key: int) -> None:
        """The backend's guest has gone, so it relies on nothing: what no other relies on is let go."""
        for watched in self._asked.pop(key, ()):
            watched.asked_by.discard(key)
            if not watched.asked_by:
                self._unused.append(watched)
        self._remove_unused()

    def watch(self, key: int, fd: int) -> bool:
        """Watch a directory, or a file with several links, for a backend.

        Args:
            key: of the backend.
            fd: an O_PATH descriptor of it, which is this object's from now on.

        Returns:
            Whether it is watched from now on.
        """
        watched = None
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in self._tree.by_identity or self._may_watch(key, status):
                watched = self._add(fd, status)
        except OSError as error:
            self._warn("a directory cannot be watched", error)
        if watched is None or watched.fd != fd:
            os.close(fd)
        if watched is None:
            self._domain.counts.refused += 1
            return False
        self._rely(key, watched)
        return True

    def _rely(self, key: int, watched: Watched) -> None:
        watched.asked_by.add(key)
        self._asked[key].add(watched)

    def _may_watch(self, key: int, status: os.stat_result) -> bool:
        if status.st_nlink < (1 if stat.S_ISDIR(status.st_mode) else 2):
            return False
        # The second half of the watches is for backends that have less than their share: none can take them all.
        share = self.limit // max(len(self._members), 1)
        if len(self._tree) >= self.limit or (
            2 * len(self._tree) >= self.limit and len(self._asked.get(key, ())) >= share
        ):
            self._warn_of_limit(f"there are {len(self._tree)} of {self.limit} watches")
            return False
        return True

    def _add(self, fd: int, status: os.stat_result) -> Watched:
        # The kernel knows best whether it is watched already: not every file system has one number for one inode.
        wd = self._inotify.add_watch(f"/proc/self/fd/{fd}", MASK)
        known = self._tree.by_wd.get(wd)
        if known is not None:
            return known
        self._domain.leases.want_markers(True)
        return self._tree.add(wd, fd, status, self._domain.table.inode_slot(status.st_dev, status.st_ino))

    def sweep(self, count: int) -> None:
        """Let go of what was removed and no event told of: look at so many watches, each in its turn."""
        if not self._unswept:
            self._unswept.extend(self._tree.by_wd.values())
        for _ in range(min(count, len(self._unswept))):
            self._look_after(self._unswept.popleft())

    def _sweep_again(self) -> None:
        assert self._loop is not None
        self.sweep(max(SWEPT_AT_ONCE, int(len(self._tree) * SWEEP_SECONDS / ALL_SWEPT_SECONDS)))
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep_again)

    def _warn(self, what: str, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            self._warn_of_limit("the kernel gives no more watches")
        elif what not in self._reported:
            self._reported.add(what)
            log.warning(what, reason=error.strerror)

    def _warn_of_limit(self, reason: str) -> None:
        if "limit" not in self._reported:
            self._reported.add("limit")
            log.warning(
                "not every directory is watched: guests do not cache the others; raise --max-watches, "
                "fs.inotify.max_user_watches and the limit of open files",
                reason=reason,
            )

    def _remove_unused(self) -> None:
        for _ in range(min(len(self._unused), REMOVED_AT_ONCE)):
            watched = self._unused.popleft()
            if not watched.asked_by and self._is_watched(watched):
                self._remove(watched)
        if self._unused and self._loop is not None:
            self._loop.call_soon(self._remove_unused)

    def _remove(self, watched: Watched) -> None:
        self._tree.remove(watched)
        self._remove_watch(watched.wd)
        for key in watched.asked_by:
            self._asked[key].discard(watched)
        if not self._tree:
            self._domain.leases.want_markers(False)

    def _remove_watch(self, wd: int) -> None:
        # The kernel has removed the watch already when the file system was unmounted.
        with contextlib.suppress(OSError):
            self._inotify.rm_watch(wd)
            self._ended.add(wd)

    # --- events ---------------------------------------------------------------------------------------------

    def process(self) -> None:
        """Read what has happened, and bump what no backend bumps."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        # What waits since the last time waits for a backend's lock.
        self._shared = bool(self._changes)
        self._read()
        self._look_up()
        if self._shared:
            # Markers of changes whose slots have been unlocked meanwhile: they must not be missed.
            self._read()
            self._look_up()
        self._judge()
        self._end_moves()
        self._listen(not self._shared)
        if self._shared or self._changes or self._moving:
            self._go_on(REST_SECONDS)

    def _go_on(self, seconds: float | None) -> None:
        """Process more after this time; None: in the next turn of the loop."""
        if self._again is not None:
            self._again.cancel()
        if self._loop is not None:
            self._again = (
                self._loop.call_soon(self.process) if seconds is None else self._loop.call_later(seconds, self.process)
            )

    def _listen(self, listens: bool) -> None:
        """Be called for each event, or not."""
        if self._loop is not None and listens != self._listens:
            self._listens = listens
            if listens:
                self._loop.add_reader(self._fd, self.process)
            else:
                self._loop.remove_reader(self._fd)

    def _read(self) -> None:
        """Read all events that there are."""
        now = time.monotonic()
        self._batch += 1
        for event in self._queue.read(bumps=not self._changes):
            self._take(event, now)
        self._attribution.end_batch(self._batch)

    def _take(self, event: Event, now: float) -> None:
        watched = self._tree.by_wd.get(event.wd)
        if event.mask & Q_OVERFLOW:
            self._overflow()
        elif event.mask & IGNORED:
            self._ignored(event.wd)
        elif watched is not None:
            if event.mask & UNMOUNT:
                self._domain.end_watch_epoch("mount")
            else:
                self._note(watched, event, now)
        elif event.wd in self._journals:
            self._shared = True
            self._attribution.mark(self._journals[event.wd], event.positions)

    def _note(self, watched: Watched, event: Event, now: float) -> None:
        name, mask, cookie, position = event.name, event.mask, event.cookie, event.positions[-1]
        key = watched.wd, mask, cookie, name
        change = self._changes.get(key)
        if change is not None:
            change.position, change.batch = position, self._batch
            change.looked_up = False
            return
        name_slot = None
        inodes = {}
        if mask & RENAMES:
            name_slot = self._domain.table.name_slot(watched.slot, name)
            inodes[watched.slot] = True
        elif not name:
            inodes[watched.slot] = mask & MODIFY != 0
        self._changes[key] = Change(watched, name, mask, position, self._batch, now, inodes, name_slot)
        if mask & MOVED_FROM:
            self._moving[cookie] = now + MOVE_SECONDS, watched, watched.children.get(name)
        elif mask & MOVED_TO and cookie in self._moving:
            _, source, _ = self._moving.pop(cookie)
            # Who relies on the watch where the thing was now relies on this one.
            for asker in source.asked_by - watched.asked_by:
                self._rely(asker, watched)

    def _look_up(self) -> None:
        found: dict[tuple[int, bytes], int | None] = {}
        for change in self._changes.values():
            if change.looked_up:
                continue
            change.looked_up = True
            if not change.name:
                self._look_after(change.watched)
            else:
                place = change.watched.wd, change.name
                if place not in found:
                    found[place] = self._slot_of(change)
                slot = found[place]
                if slot is not None:
                    # A write to the file under the name that it had before may not have been told apart: so data, too.
                    change.inodes[slot] = change.mask & (MODIFY | APPEARS) != 0
            change.slots = [*change.inodes] if change.name_slot is None else [change.name_slot, *change.inodes]
            self._shared = self._shared or any(map(self._attribution.may_be_own, change.slots))

    def _slot_of(self, change: Change) -> int | None:
        """The slot of the inode that has the name now; where directories are is kept right on the way."""
        if not self._is_watched(change.watched):
            return None
        known = change.watched.children.get(change.name) if change.mask & ISDIR and change.mask & RENAMES else None
        if known is not None:
            self._look_after(known)
        try:
            status = os.stat(change.name, dir_fd=change.watched.fd, follow_symlinks=False)
        except OSError:
            return None
        if change.mask & ISDIR and change.mask & APPEARS:
            moved = self._tree.by_identity.get((status.st_dev, status.st_ino))
            if moved is not None:
                self._tree.attach(moved, change.watched, change.name)
        return self._domain.table.inode_slot(status.st_dev, status.st_ino)

    def _look_after(self, watched: Watched) -> None:
        """Our descriptor keeps a removed inode alive: let it go."""
        if self._is_watched(watched) and watched.removed():
            self._remove(watched)

    def _is_watched(self, watched: Watched) -> bool:
        return self._tree.by_wd.get(watched.wd) is watched

    def _judge(self) -> None:
        """Bump what no backend bumps, as far as that can be told by now."""
        locked, changer = self._domain.leases.locked, self._attribution.changer
        now = time.monotonic()
        names: dict[tuple[int, bytes], None] = {}
        inodes: dict[int, bool] = {}
        settled: list[tuple[Change, list[Member | None]]] = []
        for key, change in list(self._changes.items()):
            waits = any(map(locked, change.slots))
            changers = [None if waits else changer(slot, change.position, change.batch) for slot in change.slots]
            if None in changers and change.batch == self._batch:
                # Its marker may come right after what was read last.
                waits = waits or any(map(self._attribution.may_be_own, change.slots))
            if waits and now < change.since + LOCK_SECONDS:
                self._shared = True
                continue
            del self._changes[key]
            settled.append((change, changers))
            if None not in changers:
                continue
            for slot, who in zip(change.slots, changers, strict=True):
                if who is not None:
                    continue
                if slot in change.inodes:
                    inodes[slot] = inodes.get(slot, False) or change.inodes[slot]
                if slot == change.name_slot:
                    names[change.watched.slot, change.name] = None
        self._domain.bump(names, inodes)
        for change, changers in settled:
            self._tell(change, changers)
        waiting = self._changes.values()
        self._attribution.forget(
            min((change.position for change in waiting), default=self._queue.position),
            min((change.batch for change in waiting), default=self._batch + 1),
        )

    def _tell(self, change: Change, changers: list[Member | None]) -> None:
        """Count a change that was judged, and tell who made it, by its first slot."""
        counts = self._domain.counts
        counts.events += 1
        counts.bumped += None in changers
        counts.own += bool(changers) and None not in changers
        counts.gone += not changers
        if self._domain.on_change is None:
            return
        if not changers:
            # A file that was written and is gone: told as the change of whoever changed its name since.
            name_slot = self._domain.table.name_slot(change.watched.slot, change.name)
            changers = [self._attribution.changer(name_slot, change.position, change.batch)]
        who = HOST if changers[0] is None else changers[0].guest
        self._domain.on_change(who, WHAT[change.mask & CHANGES], change.watched.path_of(change.name))

    def _tell_of_write(self, watched: Watched, name: bytes) -> None:
        """Tell of a write on the host that was bumped when it was read."""
        if self._domain.on_change is not None:
            self._domain.on_change(HOST, "modify", watched.path_of(name))

    def _end_moves(self) -> None:
        now = time.monotonic()
        gone = [cookie for cookie, (until, _, _) in self._moving.items() if until <= now]
        for cookie in gone:
            _, source, moved = self._moving.pop(cookie)
            if moved is not None and moved.parent is source and self._is_watched(moved):
                self._tree.detach(moved)
        if gone:
            log.debug("something was moved away from what is watched")
            self._domain.end_watch_epoch("moved")

    def _overflow(self) -> None:
        log.info("inotify has lost events: nothing cached counts")
        self._domain.counts.overflows += 1
        self._moving.clear()
        self._domain.end_watch_epoch("overflow")
        for watched in list(self._tree.by_wd.values()):
            self._look_after(watched)
            if self._is_watched(watched):
                self._tree.place(watched)

    def _ignored(self, wd: int) -> None:
        if wd in self._ended:
            self._ended.discard(wd)
        elif (watched := self._tree.by_wd.get(wd)) is not None:
            # Its file system was unmounted.
            self._remove(watched)


def _system_limit() -> int:
    try:
        return int(MAX_USER_WATCHES.read_text())
    except OSError:
        return 8192


def _descriptor_limit() -> int:
    """How many watches there can be, as each keeps a descriptor; asks for as many of those as may be had."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - OTHER_DESCRIPTORS, 16)
