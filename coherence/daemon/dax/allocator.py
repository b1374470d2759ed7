"""The DAX window allocator of the daemon: its messages from and to backends (docs/concepts/dax.md)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterable

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.dax.member import Member
from coherent_vfs.coherence.daemon.dax.truncations import REVOKE_SECONDS, Truncations
from coherent_vfs.coherence.daemon.dax.windows import File, Refusal, Window, Windows
from coherent_vfs.coherence.daemon.dax.write_mappings import WriteMappings
from coherent_vfs.coherence.protocol.connection import Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    Claim,
    Claimed,
    Coordinate,
    DaxPage,
    DaxUse,
    FromClient,
    Release,
    Revoked,
    Truncate,
    Truncated,
    TruncateGranted,
    Windowed,
    WindowUse,
)
from coherent_vfs.coherence.protocol.messages import Window as WindowMessage

log = get_logger(__name__)

# Waiting claims of one backend. Our client sends fewer at a time (coherence.client.dax).
MAX_CLAIMS = 256
# How long a truncation waits for a backend whose mappings are not known.
BLIND_SECONDS = REVOKE_SECONDS
# A packet has room for these and MAX_FILES files, even when every guest has the longest name.
PAGE_WINDOWS = 128

FromMember = WindowMessage | Claim | Release | Truncate | Truncated | Revoked


class Allocator:
    """Knows all DAX mappings of a domain, and revokes mappings before a file is truncated.

    Args:
        window_limit: largest size of a window, bytes.
        total_limit: largest sum of the sizes of all windows, bytes.
        inode_slot: returns the slot of a device and inode number in the version table.
        write_mappings: of that table.
        missing: whether there are live backends that are not connected: their mappings are not known.
    """

    def __init__(
        self,
        window_limit: int,
        total_limit: int,
        inode_slot: Callable[[int, int], int],
        write_mappings: WriteMappings,
        missing: Callable[[], bool],
    ) -> None:
        self._windows = Windows(window_limit, total_limit)
        self._inode_slot = inode_slot
        self._pins = write_mappings
        self._missing = missing
        self._members: dict[Member, None] = {}
        self._owners: dict[int, Member] = {}
        self._slots: dict[int, set[File]] = {}
        self._truncations = Truncations(self._holders, self._blind, self._decide)
        self._blind_until = 0.0
        self._refused = 0

    def start(self) -> None:
        """Serve clients from now on. To be called within the running event loop."""
        self._pins.start()
        self._await_missing()

    def join(
        self, guest: str, pid: int, connection: Connection[FromClient], drop: Callable[[str], None], window: bool
    ) -> Member:
        """A backend has become a member.

        Args:
            guest, pid, connection: of the backend.
            drop: ends the connection, for this reason.
            window: whether it will report a window.
        """
        member = Member(guest, pid, connection, drop, self._truncations.is_truncating)
        if window:
            member.reported_until = _now() + BLIND_SECONDS
        self._members[member] = None
        self._announce()
        return member

    def leave(self, member: Member) -> None:
        """A member's connection is over: release its window and end its truncations."""
        member.leave()
        del self._members[member]
        if member.window is not None:
            self._await_missing()
            files = {(mapping.device, mapping.inode) for mapping in member.window}
            self._windows.remove(member.window)
            del self._owners[member.window.number]
            self._index(files)
        self._truncations.leave(member)
        self._announce()

    def sweep(self) -> None:
        """Look again after some time, or when a missing backend has come back or died."""
        self._announce()
        self._truncations.look()

    def unreported(self) -> bool:
        """Whether a member has not reported all its mappings yet, and is waited for."""
        return any(_now() < member.reported_until for member in self._members)

    def changed(self, slot: int | None) -> None:
        """The data of a file with this inode slot has changed on the host; None: of any file."""
        files = self._windows.mapped_files() if slot is None else self._slots.get(slot, ())
        for file in files:
            if not self._truncations.is_truncating(file):
                for member in self._holders(file, -1):
                    member.resize(file)

    def handle(self, member: Member, message: FromMember, fds: list[int]) -> None:
        """Handle a message of a member. Raises Dropped when the member may not send it."""
        match message:
            case Truncate():
                self._truncate(member, message, fds)
            case _ if fds:
                raise Dropped("a descriptor that nobody asked for")
            case WindowMessage():
                self._window(member, message)
            case Claim() if member.window is not None and not member.telling:
                self._claim(member, message)
            case Release() if member.window is not None and not member.telling:
                self._release(member, member.window, message)
            case Truncated():
                self._truncations.end(member, message.token)
            case Revoked():
                self._truncations.revoked(member, message.token)
            case _:
                raise Dropped(f"{type(message).__name__} without a window")

    def use(self) -> DaxUse:
        """For the status."""
        windows = self._windows
        return DaxUse(
            windows=len(windows),
            window_bytes=windows.size,
            window_limit=windows.window_limit,
            mappings=windows.mappings,
            mapped_bytes=windows.mapped,
            total_limit=windows.total_limit,
            files=windows.files,
            refused=self._refused,
        )

    def page(self, first: int, files: int) -> DaxPage:
        """The windows from number `first` on, and the files with the most mapped bytes."""
        members = list(self._owners.values())
        page = [_window_use(member, member.window) for member in members[first : first + PAGE_WINDOWS] if member.window]
        end = first + len(page)
        return DaxPage(self.use(), page, self._windows.largest_files(files), end if end < len(members) else None)

    # --- windows --------------------------------------------------------------------------------------------

    def _window(self, member: Member, message: WindowMessage) -> None:
        error = refused = 0
        if member.window is None:
            try:
                member.window = self._windows.add(message.size, returning=bool(message.mappings))
                self._owners[member.window.number] = member
            except Refusal as refusal:
                log.warning("a DAX window is refused", reason=str(refusal), guest=member.guest, pid=member.pid)
                error = refusal.errno
        elif not member.telling or member.window.size != message.size:
            raise Dropped("a second window")
        if member.window is not None:
            refused = self._restore(member, member.window, message)
        member.telling = message.more and not error
        member.send(Windowed(error, self._windows.window_limit, refused))
        if not member.telling:
            member.reported_until = 0.0
            self._truncations.look()
        self._announce()

    def _restore(self, member: Member, window: Window, message: WindowMessage) -> int:
        refused = 0
        for mapping in message.mappings:
            try:
                self._windows.restore(window, mapping)
            except Refusal as refusal:
                refused += 1
                if member.warn_once("restore"):
                    log.warning("a mapping is refused", reason=str(refusal), guest=member.guest, pid=member.pid)
        self._index({(mapping.device, mapping.inode) for mapping in message.mappings})
        return refused

    def _claim(self, member: Member, claim: Claim) -> None:
        truncating = self._truncations.by_others((claim.device, claim.inode), member)
        if truncating is None:
            self._answer(member, claim)
        elif member.claims >= MAX_CLAIMS:
            self._refuse(member, claim, errno.EAGAIN)
        else:
            member.claims += 1
            truncating.claims.append((member, claim))

    def _decide(self, file: File, claims: deque[tuple[Member, Claim]]) -> None:
        """The last truncation of the file is over: answer the claims that waited."""
        for member, claim in claims:
            member.claims -= 1
            self._answer(member, claim)

    def _answer(self, member: Member, claim: Claim) -> None:
        assert member.window is not None
        try:
            mapping = self._windows.claim(
                member.window, claim.device, claim.inode, claim.offset, claim.length, claim.moffset, claim.writable
            )
        except Refusal as refusal:
            self._refuse(member, claim, refusal.errno)
            return
        self._index({(claim.device, claim.inode)})
        member.send(Claimed(claim.token, mapping.moffset, 0))

    def _refuse(self, member: Member, claim: Claim, error: int) -> None:
        self._refused += 1
        member.refused += 1
        member.send(Claimed(claim.token, claim.moffset or 0, error))

    def _release(self, member: Member, window: Window, release: Release) -> None:
        files = set()
        for moffset, length in release.ranges:
            try:
                mapping = self._windows.release(window, moffset, length)
                files.add((mapping.device, mapping.inode))
            except Refusal as refusal:
                if member.warn_once("release"):
                    log.warning("a release is refused", reason=str(refusal), guest=member.guest, pid=member.pid)
        self._index(files)

    def _index(self, files: Iterable[File]) -> None:
        """Update the mapped files by slot, and pin the slots of files with writable mappings."""
        for file in files:
            slot = self._inode_slot(*file)
            if self._windows.is_mapped(file):
                self._slots.setdefault(slot, set()).add(file)
            elif slot in self._slots:
                self._slots[slot].discard(file)
                if not self._slots[slot]:
                    del self._slots[slot]
            self._pins.want(slot, any(map(self._windows.is_written, self._slots.get(slot, ()))))

    # --- truncations ----------------------------------------------------------------------------------------

    def _truncate(self, member: Member, message: Truncate, fds: list[int]) -> None:
        if not fds:
            # This process has too many descriptors, and does not know the file: it can ask no member.
            log.warning("a file is made smaller unseen: no descriptors are left", guest=member.guest)
            member.send(TruncateGranted(message.token))
            return
        if fcntl.fcntl(fds[0], fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) not in (os.O_WRONLY, os.O_RDWR):
            raise Dropped("a Truncate with a descriptor that is not open for writing")
        try:
            found = os.fstat(fds[0])
        except OSError as error:
            raise Dropped(f"a Truncate with a descriptor that fstat refuses: {error.strerror}") from None
        self._truncations.begin(member, message.token, (found.st_dev, found.st_ino), message.size)

    def _holders(self, file: File, size: int) -> set[Member]:
        return {self._owners[number] for number in self._windows.beyond(file, size)}

    def _await_missing(self) -> None:
        self._blind_until = _now() + BLIND_SECONDS

    def _blind(self) -> bool:
        return (_now() < self._blind_until and self._missing()) or self.unreported()

    def _announce(self) -> None:
        """Tell each member whether others have windows, if that has changed."""
        blind = self._blind()
        for member in list(self._members):
            coordinate = blind or len(self._owners) > (member.window is not None)
            if member.coordinate is not coordinate:
                member.coordinate = coordinate
                member.send(Coordinate(coordinate))


def _now() -> float:
    return asyncio.get_running_loop().time()


def _window_use(member: Member, window: Window) -> WindowUse:
    return WindowUse(member.guest, member.pid, window.size, window.mappings, window.mapped, member.refused)
