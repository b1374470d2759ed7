"""What is mapped in one guest's DAX window, and how that changes (docs/concepts/dax.md).

A mapping is claimed from coherenced, then made by the front-end. What lies beyond the end of a file that another
guest or the host truncates is withdrawn: scratch is mapped in its place, as access beyond the end of a file kills the
virtual machine. Before the guest is told of a larger file again, that is taken back.
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
"""In which a mapping is restored; QEMU has room for a few hundred in all."""
LOOK_AGAIN_SECONDS: Final = 0.05
"""After which a request whose mapping is not made yet is looked at again, if it is not woken before."""

Done = Callable[[int], None]


class FrontEnd(Protocol):
    """The shared memory of the virtual machine (server.vhost_user.backend_channel)."""

    def map(self, fd: int, file_offset: int, place: int, length: int, writable: bool, done: Done) -> None:
        """Map a part of a file at a place of the window; done(errno). The descriptor stays the caller's."""

    def unmap(self, place: int, length: int, done: Done, *, replaced: bool = False) -> None:
        """Take away what was mapped so; done(errno). `replaced`: the next call maps something else there."""


class Allocator(Protocol):
    """The client of coherenced's allocator (coherence.client.dax)."""

    def claim(
        self,
        device: int,
        inode: int,
        offset: int,
        length: int,
        place: int,
        writable: bool,
        done: Callable[[int, int], None],
    ) -> None:
        """Ask for a mapping; done(place, errno)."""

    def release(self, places: list[tuple[int, int]]) -> None:
        """Give mappings back: places and lengths."""


class View(Protocol):
    """Makes descriptors that can be mapped beyond the end of the file (server.dax.view)."""

    def open(self, fd: int) -> int:
        """A descriptor for what an open file shows."""


class Files(Protocol):
    """The files of the guest (server.session.file_system.FileSystem)."""

    def reopen(self, nodeid: int, flags: int) -> int:
        """A new descriptor of an inode."""

    def fd(self, nodeid: int) -> int:
        """Its O_PATH descriptor; OSError when the guest has forgotten it."""

    def reached(self, nodeid: int) -> int:
        """The largest size of a file that the guest may know of."""

    def withdrawn_beyond(self, nodeid: int, size: int | None) -> None:
        """Note that what the guest maps of a file beyond this size is scratch; None: nothing is."""

    def reported_again(self, nodeid: int, size: int) -> None:
        """The guest was told sizes so often since it knew of a larger one that it goes by this one."""

    def wake(self) -> None:
        """Look at parked requests again."""


class Window:
    """A guest's window.

    Args:
        size: bytes, a multiple of CHUNK.
        front_end: who maps.
        allocator: who permits it.
        view: what is mapped.
        files: whose files.
    """

    def __init__(self, size: int, front_end: FrontEnd, allocator: Allocator, view: View, files: Files) -> None:
        self.size = size
        self._front_end = front_end
        self._allocator = allocator
        self._view = view
        self._files = files
        # By place: that is where a mapping is, until a reset or whoever takes it away removes it here.
        self._mappings: dict[int, Mapping] = {}
        # For which the allocator is asked; a reset does not end that.
        self._claims: list[Mapping] = []
        self._line = Line()
        # By request: None while it is served, then its errno.
        self._outcomes: dict[tuple[int, ...], int | None] = {}
        # By file: while it is open, no other one gets the inode's number.
        self._opened: dict[tuple[int, int], Opened] = {}
        self._restoring: set[int] = set()
        # Files that another guest is cutting: nothing of them beyond the new end may be mapped.
        self._withdrawn: set[tuple[int, int]] = set()
        self._session = 0

    def reset(self) -> None:
        """The device was reset, or the front-end is gone: it has taken everything away."""
        self._session += 1
        self._outcomes.clear()
        self._restoring.clear()
        self._withdrawn.clear()
        self._give_back(*self._mappings.values())
        self._mappings.clear()
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    def begin_session(self) -> None:
        """A new FUSE session begins: take away what the one before has left."""
        self._session += 1
        self._outcomes.clear()
        self._restoring.clear()
        self._line.add(self._empty, 0, self.size)

    def emptied(self, unique: int) -> bool:
        """Whether nothing is mapped any more, so that a session may end; if not, it is to be asked again when woken.

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
        """Bytes."""
        return sum(mapping.length for mapping in self._mappings.values())

    # --- requests -------------------------------------------------------------------------------------------

    def set_up(self, unique: int, nodeid: int, offset: int, length: int, writable: bool, place: int) -> None:
        """SETUPMAPPING.

        Args:
            unique: of the request, by which it is known when it is served again.
            nodeid, offset, length: of the file, bytes.
            writable: whether the guest will store.
            place: in the window, bytes.

        Raises:
            Parked: until it is done.
            OSError: it cannot be mapped.
        """
        if length <= 0 or (offset | length | place) % CHUNK or place + length > self.size:
            raise error(errno.EINVAL)
        key = (unique, nodeid, offset, length, writable, place)
        if key not in self._outcomes:
            status = os.fstat(self._files.fd(nodeid))
            if not stat.S_ISREG(status.st_mode):
                # To open a device or a FIFO does something by itself.
                raise error(errno.EINVAL)
            if any(claim.overlaps(place, length) for claim in self._claims):
                # By a request for which the guest does not wait any more: one after the other.
                raise Parked(LOOK_AGAIN_SECONDS)
            mapping = Mapping(place, length, nodeid, status.st_dev, status.st_ino, offset, writable, length)
            self._outcomes[key] = None
            start(self._set_up(key, mapping, self._session))
        self._answer(key)

    def remove(self, unique: int, places: list[tuple[int, int]]) -> None:
        """REMOVEMAPPING; raises as set_up() does.

        Args:
            unique: of the request.
            places: places and lengths of whole mappings. Linux gives those back too that it has not got.
        """
        key = (unique, *(number for pair in places for number in pair))
        if key not in self._outcomes:
            self._outcomes[key] = None
            self._line.add(self._remove, key, places, self._session)
        self._answer(key)

    def forget(self, unique: int) -> None:
        """The guest does not wait for this request any more; what is being mapped for it stays until it is replaced."""
        for key in [key for key in self._outcomes if key[0] == unique]:
            del self._outcomes[key]

    def _answer(self, key: tuple[int, ...]) -> None:
        outcome = self._outcomes[key]
        if outcome is None:
            raise Parked(LOOK_AGAIN_SECONDS)
        del self._outcomes[key]
        if outcome:
            raise error(outcome)

    def _settle(self, key: tuple[int, ...], outcome: int) -> None:
        if key in self._outcomes:
            self._outcomes[key] = outcome
            self._files.wake()

    # --- coroutines -----------------------------------------------------------------------------------------

    async def _set_up(self, key: tuple[int, ...], mapping: Mapping, session: int) -> None:
        self._claims.append(mapping)
        try:
            # In the line: what is being taken away goes first.
            room: Future[Mapping | None] = Future()
            self._line.add(self._make_room, mapping, room)
            there = await room
            if session != self._session:
                return
            if there is not None:
                await self._upgrade(there, mapping.writable, key)
                return
            # Not in the line: the claim may have to wait until something in the line is withdrawn.
            problem = await self._claim(mapping)
            if problem:
                self._settle(key, problem)
            else:
                self._line.add(self._map, key, mapping, session)
        finally:
            self._claims.remove(mapping)

    async def _make_room(self, mapping: Mapping, room: Future[Mapping | None]) -> None:
        """Take away what is in the place of a mapping, but not if it is the same; `room` gets what stays there."""
        there = self._mappings.get(mapping.place)
        if there is None or not there.same_as(mapping):
            # The guest uses it no more: something for which it did not wait, perhaps.
            there = None
            await self._empty(mapping.place, mapping.length)
        room.set_result(there)

    async def _upgrade(self, there: Mapping, writable: bool, key: tuple[int, ...]) -> None:
        """Everything is mapped to be written; only the allocator has to know."""
        problem = 0
        if writable and not there.writable:
            there.upgrading = True
            problem = await self._claim(replace(there, writable=True))
            there.upgrading = False
            there.writable = not problem
            if not self._is_there(there):
                self._give_back(there)
        self._settle(key, problem)

    def _claim(self, mapping: Mapping) -> Future[int]:
        answer: Future[int] = Future()
        self._allocator.claim(
            *mapping.file,
            mapping.offset,
            mapping.length,
            mapping.place,
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
            self._settle(key, problem.errno or errno.EIO)
            return
        self._mappings[mapping.place] = mapping
        size = os.fstat(opened.fd).st_size
        if size < self._files.reached(mapping.nodeid):
            # The guest does not know yet that there is less of it.
            self._files.withdrawn_beyond(mapping.nodeid, size)
            mapping.kept = mapping.pages_of(size)
        await self._change({mapping: mapping.kept})
        if mapping.refused:
            await self._unmap([mapping])
        self._settle(key, mapping.refused)

    async def _remove(self, key: tuple[int, ...], places: list[tuple[int, int]], session: int) -> None:
        if session != self._session:
            return
        there = [(self._mappings.get(place), length) for place, length in places]
        # Once each, also where a guest names one twice.
        await self._unmap(list({mapping: 0 for mapping, length in there if mapping and mapping.length == length}))
        wrong = any(mapping and mapping.length != length for mapping, length in there)
        self._settle(key, errno.EINVAL if wrong else 0)

    async def _empty(self, place: int, length: int) -> None:
        await self._unmap([mapping for mapping in self._mappings.values() if mapping.overlaps(place, length)])

    async def _unmap(self, mappings: list[Mapping]) -> None:
        pieces = [piece for mapping in mappings if self._is_there(mapping) for piece in mapping.pieces]
        await wait_for_all([self._unmap_piece(*piece) for piece in pieces])
        for mapping in mappings:
            if self._is_there(mapping):
                del self._mappings[mapping.place]
                self._give_back(mapping)
        for file in {mapping.file for mapping in mappings} & self._opened.keys():
            if not self._of_file(file):
                self._opened.pop(file).close()

    def _is_there(self, mapping: Mapping) -> bool:
        """Whether it was not taken away, by a reset for example, since."""
        return self._mappings.get(mapping.place) is mapping

    def _give_back(self, *mappings: Mapping) -> None:
        # One that is being upgraded is given back when that is over.
        places = [(mapping.place, mapping.length) for mapping in mappings if not mapping.upgrading]
        if places:
            self._allocator.release(places)

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

    def withdraw(self, device: int, inode: int, size: int, done: Callable[[], None]) -> None:
        """Put scratch in the place of what the guest maps of a file beyond a size, which it is about to have.

        Args:
            device, inode: the file.
            size: bytes.
            done: called when no access of the guest reaches the file there.
        """
        self._withdrawn.add((device, inode))
        self._line.add(self._withdraw, (device, inode), size, done)

    def settle(self, device: int, inode: int) -> None:
        """A withdrawal is over, or the file may have changed on the host: go by the size that it has now."""
        self._withdrawn.discard((device, inode))
        self._line.add(self._settle_size, (device, inode))

    def restore(self, nodeid: int, size: int) -> None:
        """Map the file again where scratch is in its place; wakes parked requests when that is done.

        Args:
            nodeid: of the file.
            size: that the guest is about to know of, bytes.
        """
        if nodeid not in self._restoring and not self._is_withdrawn(nodeid):
            self._restoring.add(nodeid)
            self._line.add(self._restore, nodeid, size, self._session)

    def _is_withdrawn(self, nodeid: int) -> bool:
        return any(mapping.nodeid == nodeid and mapping.file in self._withdrawn for mapping in self._mappings.values())

    async def _withdraw(self, file: tuple[int, int], size: int, done: Callable[[], None]) -> None:
        # First: what the guest is told from now on waits until this is over, also where it knows of less yet.
        for mapping in self._of_file(file):
            self._files.withdrawn_beyond(mapping.nodeid, size)
        await self._put_scratch(file, size)
        done()

    async def _settle_size(self, file: tuple[int, int]) -> None:
        opened = self._opened.get(file)
        if opened is not None:
            await self._put_scratch(file, os.fstat(opened.fd).st_size)
        self._files.wake()

    async def _put_scratch(self, file: tuple[int, int], size: int) -> None:
        # Where the guest knows of nothing beyond, it does not go there.
        there = [mapping for mapping in self._of_file(file) if size < self._files.reached(mapping.nodeid)]
        for mapping in there:
            self._files.withdrawn_beyond(mapping.nodeid, size)
        kept = {mapping: mapping.pages_of(size) for mapping in there}
        await self._change({mapping: kept[mapping] for mapping in there if kept[mapping] < mapping.kept})

    def _of_file(self, file: tuple[int, int]) -> list[Mapping]:
        return [mapping for mapping in self._mappings.values() if mapping.file == file]

    async def _restore(self, nodeid: int, size: int, session: int) -> None:
        there = [mapping for mapping in self._mappings.values() if mapping.nodeid == nodeid]
        # No more than that where the guest may know of more from before: the next look at the size would cut it off
        # again, and while that is done the guest has nothing there. But not in ever smaller pieces: each is a size that
        # the guest was told.
        if any(len(mapping.pieces) > MOST_PIECES for mapping in there):
            self._files.reported_again(nodeid, size)
        whole = size >= self._files.reached(nodeid)
        kept = {mapping: mapping.length if whole else mapping.pages_of(size) for mapping in there}
        await self._change({mapping: kept[mapping] for mapping in there if mapping.kept < kept[mapping]})
        if session == self._session:
            self._restoring.discard(nodeid)
            self._files.withdrawn_beyond(nodeid, None)
            if not whole:
                self._files.withdrawn_beyond(nodeid, size)
            self._files.wake()

    async def _change(self, wanted: dict[Mapping, int]) -> None:
        """Have so many bytes of mappings be the file's, and the rest scratch; `refused` tells how it went."""
        # All at once: what is taken away first is missing in the guest until the last is there.
        await wait_for_all([answer for mapping, kept in wanted.items() for answer in self._rebuild(mapping, kept)])
        if problem := next((mapping.refused for mapping in wanted if mapping.refused and self._is_there(mapping)), 0):
            log.warning("the virtual machine does not map a file", reason=os.strerror(problem))

    def _rebuild(self, mapping: Mapping, kept: int) -> Iterator[Future[int]]:
        """Ask for what changes a mapping, in this order; the answers."""
        view = self._opened[mapping.file].view
        # Pieces that stay as they are; not ever smaller ones.
        staying = sum(place + length <= mapping.place + min(mapping.kept, kept) for place, length in mapping.pieces)
        staying = 0 if staying > MOST_PIECES or mapping.refused else staying
        old, mapping.pieces = mapping.pieces[staying:], mapping.pieces[:staying]
        start = sum(length for _, length in mapping.pieces)
        mapping.kept, mapping.refused = kept, 0
        # What is of the file, the first, goes last: it comes again right behind.
        for place, length in reversed(old):
            yield self._unmap_piece(place, length, replaced=place == mapping.place + start)
        while start < mapping.length:
            place = mapping.place + start
            if start < kept:
                length = kept - start
                yield self._map_piece(mapping, view, mapping.offset + start, place, length)
            else:
                length = min(CHUNK, mapping.length - start)
                yield self._map_scratch(mapping, place, length)
            start += length

    def _map_scratch(self, mapping: Mapping, place: int, length: int) -> Future[int]:
        # New each time: what one of the guest's programs has stored beyond the end of its file no other one loads.
        try:
            fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
        except OSError as problem:
            mapping.refused = problem.errno or errno.EIO
            refused: Future[int] = Future()
            refused.set_result(mapping.refused)
            return refused
        os.truncate(fd, length)
        answer = self._map_piece(mapping, fd, 0, place, length)
        os.close(fd)
        return answer

    def _map_piece(self, mapping: Mapping, fd: int, offset: int, place: int, length: int) -> Future[int]:
        answer: Future[int] = Future()

        def answered(problem: int) -> None:
            if problem:
                mapping.refused = problem
            else:
                mapping.pieces.append((place, length))
            answer.set_result(problem)

        self._front_end.map(fd, offset, place, length, True, answered)
        return answer

    def _unmap_piece(self, place: int, length: int, *, replaced: bool = False) -> Future[int]:
        answer: Future[int] = Future()
        self._front_end.unmap(place, length, answer.set_result, replaced=replaced)
        return answer
