"""The DAX window allocator of the daemon: what backends ask of it, and what it tells them (docs/dax.md)."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterable

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.dax.member import Peer
from coherent_vfs.coherence.daemon.dax.truncations import WITHDRAW_SECONDS, Shrinks
from coherent_vfs.coherence.daemon.dax.windows import File, Refusal, Window, Windows
from coherent_vfs.coherence.daemon.dax.write_mappings import Pins
from coherent_vfs.coherence.protocol.connection import Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    Claim,
    Claimed,
    Coordinate,
    DaxPage,
    DaxUse,
    FromClient,
    Release,
    Shrink,
    Shrinkable,
    Shrunk,
    Windowed,
    WindowUse,
    Withdrawn,
)
from coherent_vfs.coherence.protocol.messages import Window as WindowMessage

log = get_logger(__name__)

# Claims of one backend that wait; ours asks for fewer at a time (coherence.client.dax).
MAX_CLAIMS = 256
# How long one whose mappings are not known is waited for.
BLIND_SECONDS = WITHDRAW_SECONDS
# What a packet holds besides MAX_FILES files, even when every guest has the longest name.
PAGE_WINDOWS = 128

FromMember = WindowMessage | Claim | Release | Shrink | Shrunk | Withdrawn


class Allocator:
    """Knows all DAX mappings of a domain, and what is to be done before a file is made smaller.

    Args:
        window_limit: largest size of a window, bytes.
        total_limit: of the sizes of all windows together, bytes.
        inode_slot: of a device and inode number, in the version table.
        pins: of that table.
        missing: whether backends live that are not connected: what they have mapped is not known.
    """

    def __init__(
        self,
        window_limit: int,
        total_limit: int,
        inode_slot: Callable[[int, int], int],
        pins: Pins,
        missing: Callable[[], bool],
    ) -> None:
        self._windows = Windows(window_limit, total_limit)
        self._inode_slot = inode_slot
        self._pins = pins
        self._missing = missing
        self._peers: dict[Peer, None] = {}
        self._owners: dict[int, Peer] = {}
        self._slots: dict[int, set[File]] = {}
        self._shrinks = Shrinks(self._holders, self._blind, self._decide)
        self._blind_until = 0.0
        self._refused = 0

    def start(self) -> None:
        """Clients may come from now on: within the running event loop."""
        self._pins.start()
        self._await_missing()

    def join(
        self, guest: str, pid: int, connection: Connection[FromClient], drop: Callable[[str], None], window: bool
    ) -> Peer:
        """A backend has become a member.

        Args:
            guest, pid, connection: of the backend.
            drop: ends the connection, for this reason.
            window: whether it will tell of a window.
        """
        peer = Peer(guest, pid, connection, drop, self._shrinks.is_cut)
        if window:
            peer.told_until = _now() + BLIND_SECONDS
        self._peers[peer] = None
        self._announce()
        return peer

    def leave(self, peer: Peer) -> None:
        """A member's connection is over: everything of it is given back."""
        peer.leave()
        del self._peers[peer]
        if peer.window is not None:
            self._await_missing()
            files = {(mapping.device, mapping.inode) for mapping in peer.window}
            self._windows.remove(peer.window)
            del self._owners[peer.window.number]
            self._index(files)
        self._shrinks.leave(peer)
        self._announce()

    def sweep(self) -> None:
        """Go on where time has passed, or a missing backend has come or died."""
        self._announce()
        self._shrinks.look()

    def untold(self) -> bool:
        """Whether a member has yet to tell what its guest has mapped, and is waited for."""
        return any(_now() < peer.told_until for peer in self._peers)

    def changed(self, slot: int | None) -> None:
        """The data of a file with this inode slot has changed on the host; None: that of any file."""
        files = self._windows.mapped_files() if slot is None else self._slots.get(slot, ())
        for file in files:
            if not self._shrinks.is_cut(file):
                for peer in self._holders(file, -1):
                    peer.settle(file)

    def handle(self, peer: Peer, message: FromMember, fds: list[int]) -> None:
        """Do what a member asks for. Dropped when it must not ask for that."""
        match message:
            case Shrink():
                self._shrink(peer, message, fds)
            case _ if fds:
                raise Dropped("a descriptor that nobody asked for")
            case WindowMessage():
                self._window(peer, message)
            case Claim() if peer.window is not None and not peer.telling:
                self._claim(peer, message)
            case Release() if peer.window is not None and not peer.telling:
                self._release(peer, peer.window, message)
            case Shrunk():
                self._shrinks.end(peer, message.token)
            case Withdrawn():
                self._shrinks.withdrawn(peer, message.token)
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
        """The windows from number `first` on, and the files of which most is mapped."""
        peers = list(self._owners.values())
        page = [_window_use(peer, peer.window) for peer in peers[first : first + PAGE_WINDOWS] if peer.window]
        end = first + len(page)
        return DaxPage(self.use(), page, self._windows.largest_files(files), end if end < len(peers) else None)

    # --- windows --------------------------------------------------------------------------------------------

    def _window(self, peer: Peer, message: WindowMessage) -> None:
        error = refused = 0
        if peer.window is None:
            try:
                peer.window = self._windows.add(message.size, returning=bool(message.mappings))
                self._owners[peer.window.number] = peer
            except Refusal as refusal:
                log.warning("a DAX window is refused", reason=str(refusal), guest=peer.guest, pid=peer.pid)
                error = refusal.errno
        elif not peer.telling or peer.window.size != message.size:
            raise Dropped("a second window")
        if peer.window is not None:
            refused = self._restore(peer, peer.window, message)
        peer.telling = message.more and not error
        peer.send(Windowed(error, self._windows.window_limit, refused))
        if not peer.telling:
            peer.told_until = 0.0
            self._shrinks.look()
        self._announce()

    def _restore(self, peer: Peer, window: Window, message: WindowMessage) -> int:
        refused = 0
        for mapping in message.mappings:
            try:
                self._windows.restore(window, mapping)
            except Refusal as refusal:
                refused += 1
                if peer.warn_once("restore"):
                    log.warning("a mapping is refused", reason=str(refusal), guest=peer.guest, pid=peer.pid)
        self._index({(mapping.device, mapping.inode) for mapping in message.mappings})
        return refused

    def _claim(self, peer: Peer, claim: Claim) -> None:
        cut = self._shrinks.cut_by_others((claim.device, claim.inode), peer)
        if cut is None:
            self._answer(peer, claim)
        elif peer.claims >= MAX_CLAIMS:
            self._refuse(peer, claim, errno.EAGAIN)
        else:
            peer.claims += 1
            cut.claims.append((peer, claim))

    def _decide(self, file: File, claims: deque[tuple[Peer, Claim]]) -> None:
        """The file is not being made smaller any more: answer the claims that waited."""
        for peer, claim in claims:
            peer.claims -= 1
            self._answer(peer, claim)

    def _answer(self, peer: Peer, claim: Claim) -> None:
        assert peer.window is not None
        try:
            mapping = self._windows.claim(
                peer.window, claim.device, claim.inode, claim.offset, claim.length, claim.place, claim.writable
            )
        except Refusal as refusal:
            self._refuse(peer, claim, refusal.errno)
            return
        self._index({(claim.device, claim.inode)})
        peer.send(Claimed(claim.token, mapping.place, 0))

    def _refuse(self, peer: Peer, claim: Claim, error: int) -> None:
        self._refused += 1
        peer.refused += 1
        peer.send(Claimed(claim.token, claim.place or 0, error))

    def _release(self, peer: Peer, window: Window, release: Release) -> None:
        files = set()
        for place, length in release.places:
            try:
                mapping = self._windows.release(window, place, length)
                files.add((mapping.device, mapping.inode))
            except Refusal as refusal:
                if peer.warn_once("release"):
                    log.warning("a release is refused", reason=str(refusal), guest=peer.guest, pid=peer.pid)
        self._index(files)

    def _index(self, files: Iterable[File]) -> None:
        """Keep in `slots` what of these is mapped, and pinned what is mapped to be stored into."""
        for file in files:
            slot = self._inode_slot(*file)
            if self._windows.is_mapped(file):
                self._slots.setdefault(slot, set()).add(file)
            elif slot in self._slots:
                self._slots[slot].discard(file)
                if not self._slots[slot]:
                    del self._slots[slot]
            self._pins.want(slot, any(map(self._windows.is_written, self._slots.get(slot, ()))))

    # --- files that are made smaller ------------------------------------------------------------------------

    def _shrink(self, peer: Peer, message: Shrink, fds: list[int]) -> None:
        if not fds:
            # This process has too many descriptors: nobody can be asked.
            log.warning("a file is made smaller unseen: no descriptors are left", guest=peer.guest)
            peer.send(Shrinkable(message.token))
            return
        if fcntl.fcntl(fds[0], fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) not in (os.O_WRONLY, os.O_RDWR):
            raise Dropped("a Shrink with a descriptor that is not open for writing")
        try:
            found = os.fstat(fds[0])
        except OSError as error:
            raise Dropped(f"a Shrink with a descriptor that tells nothing: {error.strerror}") from None
        self._shrinks.begin(peer, message.token, (found.st_dev, found.st_ino), message.size)

    def _holders(self, file: File, size: int) -> set[Peer]:
        return {self._owners[number] for number in self._windows.beyond(file, size)}

    def _await_missing(self) -> None:
        self._blind_until = _now() + BLIND_SECONDS

    def _blind(self) -> bool:
        return (_now() < self._blind_until and self._missing()) or self.untold()

    def _announce(self) -> None:
        """Tell members whether others have windows, where that has changed."""
        blind = self._blind()
        for peer in list(self._peers):
            coordinate = blind or len(self._owners) > (peer.window is not None)
            if peer.coordinate is not coordinate:
                peer.coordinate = coordinate
                peer.send(Coordinate(coordinate))


def _now() -> float:
    return asyncio.get_running_loop().time()


def _window_use(peer: Peer, window: Window) -> WindowUse:
    return WindowUse(peer.guest, peer.pid, window.size, window.mappings, window.mapped, peer.refused)
