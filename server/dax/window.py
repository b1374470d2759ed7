"""The mappings in one guest's DAX window, and how they change (docs/concepts/dax.md).

The backend claims a mapping from coherenced, then the front-end makes it. When another guest or the host truncates a
file, mappings beyond its end are revoked: a scratch mapping replaces them, as access beyond the end of a file kills
the virtual machine. The file is mapped again before the guest is told of a larger size.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.server.caching.parking import Parked
from coherent_vfs.server.dax.coroutines import Future, Line, start, wait_for_all
from coherent_vfs.server.dax.mapping import Mapping, Opened
from coherent_vfs.server.host.errors import error

log = get_logger(__name__)

MOST_PIECES: Final = 8
"""Most pieces of one restored mapping. QEMU has room for a few hundred pieces in all."""
LOOK_AGAIN_SECONDS: Final = 0.05
"""Seconds after which a parked request is served again, if it is not woken before."""

Done = Callable[[int], None]


class FrontEnd(Protocol):
    """The shared memory of the virtual machine (server.vhost_user.backend_channel)."""

    def map(self, fd: int, file_offset: int, moffset: int, length: int, writable: bool, done: Done) -> None:
        """Map a range of a file at a moffset; calls done(errno). The descriptor stays the caller's."""

    def unmap(self, moffset: int, length: int, done: Done, *, replaced: bool = False) -> None:
        """Unmap a piece; calls done(errno). `replaced`: the next call maps something else there."""


class Allocator(Protocol):
    """The client of coherenced's allocator (coherence.client.dax)."""

    def claim(
        self,
        device: int,
        inode: int,
        offset: int,
        length: int,
        moffset: int,
        writable: bool,
        done: Callable[[int, int], None],
    ) -> None:
        """Ask for a mapping; calls done(moffset, errno)."""

    def release(self, ranges: list[tuple[int, int]]) -> None:
        """Give mappings back: moffset and length of each."""


class View(Protocol):
    """Makes descriptors that can be mapped beyond the end of the file (server.dax.view)."""

    def open(self, fd: int) -> int:
        """A descriptor of a view of an open file."""


class Files(Protocol):
    """The files of the guest (server.session.file_system.FileSystem)."""

    def reopen(self, nodeid: int, flags: int) -> int:
        """A new descriptor of an inode."""

    def fd(self, nodeid: int) -> int:
        """Its O_PATH descriptor; OSError when the guest has forgotten it."""

    def reached(self, nodeid: int) -> int:
        """The largest size of a file that the guest may know."""

    def revoked_beyond(self, nodeid: int, size: int | None) -> None:
        """Note that the guest has scratch mappings of a file beyond this size; None: it has none."""

    def reported_again(self, nodeid: int, size: int) -> None:
        """From now on take this as the largest size of a file that the guest may know."""

    def wake(self) -> None:
        """Look at parked requests again."""


class Window:
    """A guest's window.

    Args:
        size: bytes, a multiple of CHUNK.
        front_end: makes the mappings.
        allocator: grants them.
        view: makes the descriptors that are mapped.
        files: of the guest.
    """

    def __init__(self, size: int, front_end: FrontEnd, allocator: Allocator, view: View, files: Files) -> None:
        self.size = size
        self._front_end = front_end
        self._allocator = allocator
        self._view = view
        self._files = files
        # By moffset.
        self._mappings: dict[int, Mapping] = {}
        # Claims that the allocator has not answered. A reset does not end them.
        self._claims: list[Mapping] = []
        self._line = Line()
        # By request: None while the work for it is under way, then its errno.
        self._outcomes: dict[tuple[int, ...], int | None] = {}
        # By file. While it is open, no other file gets its inode number.
        self._opened: dict[tuple[int, int], Opened] = {}
        self._restoring: set[int] = set()
        # Files that another guest is truncating: nothing beyond their new end may be mapped.
        self._revoked: set[tuple[int, int]] = set()
        self._session = 0

    def reset(self) -> None:
        """The device was reset, or the front-end is gone: nothing is mapped any more."""
        self._session += 1
        self._outcomes.clear()
        self._restoring.clear()
        self._revoked.clear()
        self._give_back(*self._mappings.values())
        self._mappings.clear()
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def begin_session(self) -> None:
        """A new FUSE session begins: unmap what the previous one has left."""
        self._session += 1
        self._outcomes.clear()
        self._restoring.clear()
        self._line.add(self._empty, 0, self.size)

    def emptied(self, unique: int) -> bool:
        """Unmap everything before a session ends. Returns whether that is done; if not, call it again when woken.

        Args:
            unique: of the request.
        """
        key = (unique,)
        if key not in self._outcomes:
            self.begin_session()
            self._outcomes[key] = None
            self._line.add(self._remove, key, [], self._session)
        if self._outcomes[key] is None:
            return False
        del self._outcomes[key]
        return True

    @property
    def mapped(self) -> int:
        """Bytes that are mapped."""
        return sum(mapping.length for mapping in self._mappings.values())

    # --- requests -------------------------------------------------------------------------------------------

    def set_up(self, unique: int, nodeid: int, offset: int, length: int, writable: bool, moffset: int) -> None:
        """SETUPMAPPING.

        Args:
            unique: of the request. A parked request is recognised by it when it is served again.
            nodeid, offset, length: of the file, bytes.
            writable: whether the guest will store.
            moffset: in the window, bytes.

        Raises:
            Parked: until it is done.
            OSError: it cannot be mapped.
        """
        if length <= 0 or (offset | length | moffset) % CHUNK or moffset + length > self.size:
            raise error(errno.EINVAL)
        key = (unique, nodeid, offset, length, writable, moffset)
        if key not in self._outcomes:
            status = os.fstat(self._files.fd(nodeid))
            if not stat.S_ISREG(status.st_mode):
                # Opening a device or a FIFO has side effects.
                raise error(errno.EINVAL)
            if any(claim.overlaps(moffset, length) for claim in self._claims):
                # The claim of a request for which the guest does not wait any more has to end first.
                raise Parked(LOOK_AGAIN_SECONDS)
            mapping = Mapping(moffset, length, nodeid, status.st_dev, status.st_ino, offset, writable, length)
            self._outcomes[key] = None
            start(self._set_up(key, mapping, self._session))
        self._answer(key)

    def remove(self, unique: int, ranges: list[tuple[int, int]]) -> None:
        """REMOVEMAPPING; raises as set_up() does.

        Args:
            unique: of the request.
            ranges: moffset and length of whole mappings. Linux also names mappings that do not exist.
        """
        key = (unique, *(number for pair in ranges for number in pair))
        if key not in self._outcomes:
            self._outcomes[key] = None
            self._line.add(self._remove, key, ranges, self._session)
        self._answer(key)

    def forget(self, unique: int) -> None:
        """The guest does not wait for this request any more. A mapping under way for it stays until replaced."""
        for key in [key for key in self._outcomes if key[0] == unique]:
            del self._outcomes[key]

    def _answer(self, key: tuple[int, ...]) -> None:
        outcome = self._outcomes[key]
        if outcome is None:
            raise Parked(LOOK_AGAIN_SECONDS)
        del self._outcomes[key]
        if outcome:
            raise error(outcome)

    def _finish(self, key: tuple[int, ...], outcome: int) -> None:
        if key in self._outcomes:
            self._outcomes[key] = outcome
            self._files.wake()

    # --- coroutines -----------------------------------------------------------------------------------------

    async def _set_up(self, key: tuple[int, ...], mapping: Mapping, session: int) -> None:
        self._claims.append(mapping)
        try:
            # In the line: after what is being unmapped there.
            room: Future[Mapping | None] = Future()
            self._line.add(self._make_room, mapping, room)
            there = await room
            if session != self._session:
                return
            if there is not None:
                await self._upgrade(there, mapping.writable, key)
                return
            # Not in the line: the claim may wait for a revocation that is in the line.
            problem = await self._claim(mapping)
            if problem:
                self._finish(key, problem)
            else:
                self._line.add(self._map, key, mapping, session)
        finally:
            self._claims.remove(mapping)

    async def _make_room(self, mapping: Mapping, room: Future[Mapping | None]) -> None:
        """Unmap what overlaps a mapping, unless it is the same; `room` gets the mapping that stays, or None."""
        there = self._mappings.get(mapping.moffset)
        if there is None or not there.same_as(mapping):
            # The guest uses it no more. It may be of a request for which it did not wait.
            there = None
            await self._empty(mapping.moffset, mapping.length)
        room.set_result(there)

    async def _upgrade(self, there: Mapping, writable: bool, key: tuple[int, ...]) -> None:
        """Make a mapping writable. The front-end maps all writable; only the allocator has to grant it."""
        problem = 0
        if writable and not there.writable:
            there.upgrading = True
            problem = await self._claim(replace(there, writable=True))
            there.upgrading = False
            there.writable = not problem
            if not self._is_there(there):
                self._give_back(there)
        self._finish(key, problem)

    def _claim(self, mapping: Mapping) -> Future[int]:
        answer: Future[int] = Future()
        self._allocator.claim(
            *mapping.file,
            mapping.offset,
            mapping.length,
            mapping.moffset,
            mapping.writable,
            lambda _, problem: answer.set_result(problem),
        )
        return answer

    async def _map(self, key: tuple[int, ...], mapping: Mapping, session: int) -> None:
        if session != self._session:
            self._give_back(mapping)
            return
        try:
            opened = self._open(mapping)
        except OSError as problem:
            self._give_back(mapping)
            self._finish(key, problem.errno or errno.EIO)
            return
        self._mappings[mapping.moffset] = mapping
        size = os.fstat(opened.fd).st_size
        if size < self._files.reached(mapping.nodeid):
            # The guest does not know yet that the file is smaller.
            self._files.revoked_beyond(mapping.nodeid, size)
            mapping.kept = mapping.pages_of(size)
        await self._change({mapping: mapping.kept})
        if mapping.refused:
            await self._unmap([mapping])
        self._finish(key, mapping.refused)

    async def _remove(self, key: tuple[int, ...], ranges: list[tuple[int, int]], session: int) -> None:
        if session != self._session:
            return
        there = [(self._mappings.get(moffset), length) for moffset, length in ranges]
        # Each once, even if the guest names it twice.
        await self._unmap(list({mapping: 0 for mapping, length in there if mapping and mapping.length == length}))
        wrong = any(mapping and mapping.length != length for mapping, length in there)
        self._finish(key, errno.EINVAL if wrong else 0)

    async def _empty(self, moffset: int, length: int) -> None:
        await self._unmap([mapping for mapping in self._mappings.values() if mapping.overlaps(moffset, length)])

    async def _unmap(self, mappings: list[Mapping]) -> None:
        pieces = [piece for mapping in mappings if self._is_there(mapping) for piece in mapping.pieces]
        await wait_for_all([self._unmap_piece(*piece) for piece in pieces])
        for mapping in mappings:
            if self._is_there(mapping):
                del self._mappings[mapping.moffset]
                self._give_back(mapping)
        for file in {mapping.file for mapping in mappings} & self._opened.keys():
            if not self._of_file(file):
                self._opened.pop(file).close()

    def _is_there(self, mapping: Mapping) -> bool:
        """Whether it was not removed meanwhile, for example by a reset."""
        return self._mappings.get(mapping.moffset) is mapping

    def _give_back(self, *mappings: Mapping) -> None:
        # _upgrade gives back a mapping whose claim is under way.
        ranges = [(mapping.moffset, mapping.length) for mapping in mappings if not mapping.upgrading]
        if ranges:
            self._allocator.release(ranges)

    def _open(self, mapping: Mapping) -> Opened:
        opened = self._opened.get(mapping.file)
        if opened is None:
            fd = self._files.reopen(mapping.nodeid, os.O_RDWR)
            try:
                opened = Opened(fd, self._view.open(fd))
            except OSError:
                os.close(fd)
                raise
            self._opened[mapping.file] = opened
        return opened

    # --- ends of files --------------------------------------------------------------------------------------

    def revoke(self, device: int, inode: int, size: int, done: Callable[[], None]) -> None:
        """Replace the mappings of a file beyond its coming size by scratch mappings.

        Args:
            device, inode: the file.
            size: bytes.
            done: called when no access by the guest reaches the file there.
        """
        self._revoked.add((device, inode))
        self._line.add(self._revoke, (device, inode), size, done)

    def resize(self, device: int, inode: int) -> None:
        """A revocation is over, or the file may have a new size on the host: map it by its present size."""
        self._revoked.discard((device, inode))
        self._line.add(self._resize, (device, inode))

    def restore(self, nodeid: int, size: int) -> None:
        """Map the file again in place of scratch mappings; wake parked requests when that is done.

        Args:
            nodeid: of the file.
            size: that the guest is about to be told, bytes.
        """
        if nodeid not in self._restoring and not self._is_revoked(nodeid):
            self._restoring.add(nodeid)
            self._line.add(self._restore, nodeid, size, self._session)

    def _is_revoked(self, nodeid: int) -> bool:
        return any(mapping.nodeid == nodeid and mapping.file in self._revoked for mapping in self._mappings.values())

    async def _revoke(self, file: tuple[int, int], size: int, done: Callable[[], None]) -> None:
        # First, so that a reply with a larger size waits until this is over, even if the guest knows a smaller one now.
        for mapping in self._of_file(file):
            self._files.revoked_beyond(mapping.nodeid, size)
        await self._put_scratch(file, size)
        done()

    async def _resize(self, file: tuple[int, int]) -> None:
        opened = self._opened.get(file)
        if opened is not None:
            await self._put_scratch(file, os.fstat(opened.fd).st_size)
        self._files.wake()

    async def _put_scratch(self, file: tuple[int, int], size: int) -> None:
        # A guest that knows no larger size does not access what is beyond.
        there = [mapping for mapping in self._of_file(file) if size < self._files.reached(mapping.nodeid)]
        for mapping in there:
            self._files.revoked_beyond(mapping.nodeid, size)
        kept = {mapping: mapping.pages_of(size) for mapping in there}
        await self._change({mapping: kept[mapping] for mapping in there if kept[mapping] < mapping.kept})

    def _of_file(self, file: tuple[int, int]) -> list[Mapping]:
        return [mapping for mapping in self._mappings.values() if mapping.file == file]

    async def _restore(self, nodeid: int, size: int, session: int) -> None:
        there = [mapping for mapping in self._mappings.values() if mapping.nodeid == nodeid]
        # Only up to this size if the guest may know a larger one from before: the next _resize would put scratch there
        # again, and nothing is mapped meanwhile. But not in ever smaller pieces: each is a size that the guest was
        # told.
        if any(len(mapping.pieces) > MOST_PIECES for mapping in there):
            self._files.reported_again(nodeid, size)
        whole = size >= self._files.reached(nodeid)
        kept = {mapping: mapping.length if whole else mapping.pages_of(size) for mapping in there}
        await self._change({mapping: kept[mapping] for mapping in there if mapping.kept < kept[mapping]})
        if session == self._session:
            self._restoring.discard(nodeid)
            self._files.revoked_beyond(nodeid, None)
            if not whole:
                self._files.revoked_beyond(nodeid, size)
            self._files.wake()

    async def _change(self, wanted: dict[Mapping, int]) -> None:
        """Map so many bytes of each mapping from the file, and scratch behind; `refused` has the result."""
        # All requests at once: from the first unmap to the last map something is missing in the guest.
        await wait_for_all([answer for mapping, kept in wanted.items() for answer in self._rebuild(mapping, kept)])
        if problem := next((mapping.refused for mapping in wanted if mapping.refused and self._is_there(mapping)), 0):
            log.warning("the virtual machine does not map a file", reason=os.strerror(problem))

    def _rebuild(self, mapping: Mapping, kept: int) -> Iterator[Future[int]]:
        """Send the requests that change a mapping, in order; yield their answers."""
        view = self._opened[mapping.file].view
        # Keep the pieces that do not change, unless they have become too many.
        staying = sum(
            moffset + length <= mapping.moffset + min(mapping.kept, kept) for moffset, length in mapping.pieces
        )
        staying = 0 if staying > MOST_PIECES or mapping.refused else staying
        old, mapping.pieces = mapping.pieces[staying:], mapping.pieces[:staying]
        start = sum(length for _, length in mapping.pieces)
        mapping.kept, mapping.refused = kept, 0
        # Last the first piece, which shows the file: the next request maps it again.
        for moffset, length in reversed(old):
            yield self._unmap_piece(moffset, length, replaced=moffset == mapping.moffset + start)
        while start < mapping.length:
            moffset = mapping.moffset + start
            if start < kept:
                length = kept - start
                yield self._map_piece(mapping, view, mapping.offset + start, moffset, length)
            else:
                length = min(CHUNK, mapping.length - start)
                yield self._map_scratch(mapping, moffset, length)
            start += length

    def _map_scratch(self, mapping: Mapping, moffset: int, length: int) -> Future[int]:
        # New memory each time: a program in the guest must not load what another one has stored beyond an end of file.
        try:
            fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
        except OSError as problem:
            mapping.refused = problem.errno or errno.EIO
            refused: Future[int] = Future()
            refused.set_result(mapping.refused)
            return refused
        os.truncate(fd, length)
        answer = self._map_piece(mapping, fd, 0, moffset, length)
        os.close(fd)
        return answer

    def _map_piece(self, mapping: Mapping, fd: int, offset: int, moffset: int, length: int) -> Future[int]:
        answer: Future[int] = Future()

        def answered(problem: int) -> None:
            if problem:
                mapping.refused = problem
            else:
                mapping.pieces.append((moffset, length))
            answer.set_result(problem)

        self._front_end.map(fd, offset, moffset, length, True, answered)
        return answer

    def _unmap_piece(self, moffset: int, length: int, *, replaced: bool = False) -> Future[int]:
        answer: Future[int] = Future()
        self._front_end.unmap(moffset, length, answer.set_result, replaced=replaced)
        return answer
