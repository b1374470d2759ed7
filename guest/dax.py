"""Files read and written by load and store, through the guest's window: what Linux does in fs/fuse/dax.c.

The window is divided into ranges of CHUNK bytes. A range shows one chunk of one file, which the server was asked to
map there (SETUPMAPPING), until the guest forgets the file or another chunk needs the range.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.guest.cached import Node
from coherent_vfs.guest.fuse_client import FuseClient
from coherent_vfs.guest.window import Window
from coherent_vfs.server.fuse.protocol import Attr, AttrFlag, InitFlag

REMOVEMAPPING_MAX: Final = 256
"""Mappings in one REMOVEMAPPING (FUSE_REMOVEMAPPING_MAX_ENTRY)."""

DaxMode = Literal["never", "always", "inode"]
"""As the mount option of Linux: files of which it makes use of the window: none, all, or those that the server says."""

_S_IFMT: Final = 0o170000
_S_IFREG: Final = 0o100000


class Chunk:
    """A chunk of a file in the window.

    Attributes:
        nodeid, index: whose, and the how many-th of it.
        moffset: where in the window, bytes.
        writable: whether it was mapped to be written.
        copies: reads and writes that are going on there.
        views: memoryviews of it that are in use.
    """

    __slots__ = ("copies", "index", "moffset", "nodeid", "views", "writable")

    def __init__(self, nodeid: int, index: int, moffset: int, writable: bool) -> None:
        self.nodeid = nodeid
        self.index = index
        self.moffset = moffset
        self.writable = writable
        self.copies = 0
        self.views = 0


class Dax:
    """The files in one guest's window. Several threads may use it.

    Args:
        client: the FUSE session.
        window: the window.
        mode: which files.

    Attributes:
        window: the window.
    """

    def __init__(self, client: FuseClient, window: Window, mode: DaxMode) -> None:
        self._client = client
        self.window = window
        self._mode = mode
        self._free = deque(range(0, window.size // CHUNK * CHUNK, CHUNK))
        self._chunks: dict[int, dict[int, Chunk]] = {}
        self._recent: OrderedDict[Chunk, None] = OrderedDict()
        # Reentrant: the end of a view may be noticed in the middle of anything.
        self._changed = threading.Condition(threading.RLock())
        client.before_forget = self._forget

    def enabled(self, attr: Attr) -> bool:
        """Whether a file with these attributes is read and written here."""
        if attr.mode & _S_IFMT != _S_IFREG or self._mode == "never":
            return False
        if self._mode == "always":
            return True
        return InitFlag.HAS_INODE_DAX in self._client.flags and bool(attr.flags & AttrFlag.DAX)

    @property
    def mapped(self) -> int:
        """Bytes of the window that are in use."""
        return len(self._recent) * CHUNK

    @property
    def chunks(self) -> list[Chunk]:
        """What is in the window."""
        with self._changed:
            return list(self._recent)

    def read(self, node: Node, offset: int, size: int) -> bytes:
        """Load `size` bytes, which must lie within the file."""
        parts = []
        while size:
            with self._copying(node, offset // CHUNK, writable=False) as chunk:
                start = offset % CHUNK
                parts.append(self.window.load(chunk.moffset + start, min(size, CHUNK - start)))
            size -= len(parts[-1])
            offset += len(parts[-1])
        return b"".join(parts)

    def write(self, node: Node, offset: int, data: memoryview) -> None:
        """Store bytes, within the file."""
        while data:
            with self._copying(node, offset // CHUNK, writable=True) as chunk:
                start = offset % CHUNK
                part = data[: CHUNK - start]
                self.window.store(chunk.moffset + start, part)
            data = data[len(part) :]
            offset += len(part)

    def view(self, node: Node, offset: int, length: int, *, writable: bool) -> memoryview:
        """The part of a file itself, within one chunk. The chunk stays until nothing refers to the view any more.

        Raises:
            ValueError: it is not within one chunk.
            OSError: ENOMEM, such views take the whole window; and what the server answers.
        """
        index, start = divmod(offset, CHUNK)
        if offset < 0 or length <= 0 or start + length > CHUNK:
            raise ValueError(f"{length} bytes at {offset} are not within one chunk of {CHUNK} bytes")
        with self._changed:
            chunk = self._chunk(node, index, writable)
            chunk.views += 1
        piece = self.window.piece(chunk.moffset + start, length)
        # The node is an argument to be kept: what is forgotten loses its chunks.
        weakref.finalize(piece, self._view_ended, chunk, node)
        view = memoryview(piece).cast("B")
        return view if writable else view.toreadonly()

    def _view_ended(self, chunk: Chunk, _: Node) -> None:
        with self._changed:
            chunk.views -= 1
            self._changed.notify_all()

    @contextmanager
    def _copying(self, node: Node, index: int, *, writable: bool) -> Iterator[Chunk]:
        with self._changed:
            chunk = self._chunk(node, index, writable)
            chunk.copies += 1
        try:
            yield chunk
        finally:
            with self._changed:
                chunk.copies -= 1
                self._changed.notify_all()

    def _chunk(self, node: Node, index: int, writable: bool) -> Chunk:
        """A file's chunk, mapped. The lock is held."""
        while (chunk := self._chunks.get(node.nodeid, {}).get(index)) is None:
            # Where this has to wait, another thread may map the chunk meanwhile.
            if self._make_room():
                chunk = Chunk(node.nodeid, index, self._free[0], writable)
                self._set_up(chunk, writable=writable)
                self._free.popleft()
                self._chunks.setdefault(node.nodeid, {})[index] = chunk
                self._recent[chunk] = None
                return chunk
        self._recent.move_to_end(chunk)
        if writable and not chunk.writable:
            self._set_up(chunk, writable=True)
        return chunk

    def _set_up(self, chunk: Chunk, *, writable: bool) -> None:
        self._client.setup_mapping(chunk.nodeid, chunk.index * CHUNK, CHUNK, chunk.moffset, writable=writable)
        chunk.writable = writable

    def _make_room(self) -> bool:
        """Free a range, by dropping the least recently used chunk. False after waiting, if all were in use."""
        if not self._free:
            idle = next((chunk for chunk in self._recent if not chunk.copies and not chunk.views), None)
            if idle is not None:
                self._drop([idle])
            elif all(chunk.views for chunk in self._recent):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            else:
                self._changed.wait()
        return bool(self._free)

    def _forget(self, nodeid: int) -> None:
        """The server will be told to forget a node."""
        if nodeid not in self._chunks:
            return
        with self._changed:
            # What is in use belongs to a node that has come under the same number since.
            chunks = self._chunks.get(nodeid, {}).values()
            self._drop([chunk for chunk in chunks if not chunk.copies and not chunk.views])

    def _drop(self, chunks: list[Chunk]) -> None:
        """Give chunks of one file back."""
        for chunk in chunks:
            of_node = self._chunks[chunk.nodeid]
            del of_node[chunk.index]
            if not of_node:
                del self._chunks[chunk.nodeid]
            del self._recent[chunk]
        for first in range(0, len(chunks), REMOVEMAPPING_MAX):
            some = chunks[first : first + REMOVEMAPPING_MAX]
            # As in Linux a failure is ignored: the next SETUPMAPPING at this moffset replaces what is there.
            with suppress(OSError):
                self._client.remove_mappings(some[0].nodeid, [(chunk.moffset, CHUNK) for chunk in some])
        self._free.extend(chunk.moffset for chunk in chunks)
        self._changed.notify_all()
