"""An open file of a guest, with the page cache between it and the server."""

from __future__ import annotations

import errno
import os
import warnings
from typing import Final, Self

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.guest.cache import PAGE_SIZE
from coherent_vfs.guest.cached import Node
from coherent_vfs.guest.fuse_client import Opened
from coherent_vfs.guest.transport import Buffer
from coherent_vfs.guest.tree import Naming, Tree
from coherent_vfs.server.fuse.protocol import OpenFlag

READ_AHEAD: Final = 128 * 1024


class File:
    """A file opened by FileSystem.open(). Its methods are those of os, without the descriptor.

    Attributes:
        path: the path that it was opened by.
        node: its inode.
        fh: the server's handle of it.
        flags: the O_* flags.
        client: the session that it belongs to.
    """

    def __init__(self, tree: Tree, path: str, node: Node, opened: Opened, flags: int) -> None:
        self.path = path
        self.node = node
        self.fh = opened.fh
        self.flags = flags
        self._tree = tree
        self.client = tree.client
        self._cache = tree.cache
        self._open_flags = opened.flags
        self._dax = tree.dax if node.dax else None
        self._direct = bool(opened.flags & OpenFlag.DIRECT_IO) or bool(flags & os.O_DIRECT)
        self._position = 0
        self._read_end = 0
        self._closed = False
        if not opened.flags & OpenFlag.KEEP_CACHE and not self._direct:
            node.drop_pages()

    # --- reading ---------------------------------------------------------------------------------

    def read(self, size: int = -1) -> bytes:
        """Read at the position, and move it: `size` bytes, or all to the end."""
        if size >= 0:
            data = self.pread(size, self._position)
        else:
            parts = []
            position = self._position
            while part := self.pread(1 << 20, position):
                parts.append(part)
                position += len(part)
            data = b"".join(parts)
        self._position += len(data)
        return data

    def pread(self, size: int, offset: int) -> bytes:
        """Read `size` bytes at `offset`, fewer where the file ends."""
        self._check(os.O_WRONLY)
        with Naming(self.path):
            if self._dax is not None:
                size = max(0, min(size, self._tree.size(self.node, self.fh) - offset))
                return self._dax.read(self.node, offset, size)
            return self._read_direct(size, offset) if self._direct else self._read_cached(size, offset)

    def _read_direct(self, size: int, offset: int) -> bytes:
        parts = []
        while size:
            asked = min(size, self.client.max_read)
            part = self.client.read(self.node.nodeid, self.fh, asked, offset, self.flags)
            parts.append(part)
            if len(part) < asked:
                break
            size -= asked
            offset += asked
        return b"".join(parts)

    def _read_cached(self, size: int, offset: int) -> bytes:
        timed = not self._cache.rule.aware
        if timed and self._cache.auto_inval:
            self._tree.attributes(self.node)
        parts = []
        position, end = offset, offset + size
        while position < end:
            index, skip = divmod(position, PAGE_SIZE)
            generation = self.node.generation
            data = self._cache.page(self.node, index)
            at_end = data is not None and len(data) < PAGE_SIZE
            if at_end and timed:
                self._tree.attributes(self.node)
                if self.node.generation is not generation:
                    continue
            if data is None:
                data, at_end = self._fetch(generation, index, end, position == self._read_end)
            part = data[skip : skip + end - position]
            parts.append(part)
            position += len(part)
            if at_end:
                break
        self._read_end = position
        return b"".join(parts)

    def _fetch(self, generation: object, index: int, end: int, sequential: bool) -> tuple[bytes, bool]:
        """READ from a page on, keep it, and return it and whether the file ends within."""
        start = index * PAGE_SIZE
        asked = -(-(end - start) // PAGE_SIZE) * PAGE_SIZE
        if sequential:
            asked = max(asked, READ_AHEAD)
        asked = min(asked, self.client.max_read)
        stamp = self._cache.rule.stamp()
        data = self.client.read(self.node.nodeid, self.fh, asked, start, self.flags)
        self._cache.keep_pages(generation, index, data, asked, stamp)
        return data, len(data) < asked

    def mmap(self, length: int | None = None, offset: int = 0) -> memoryview:
        """The file itself, in the guest's window: writable if the file is. Access beyond its last page is SIGBUS.

        Args:
            length: bytes, within one chunk of 2 MiB; None for all to the chunk's or the file's end.
            offset: bytes.

        Raises:
            OSError: ENODEV, the file is not read through the window; EACCES, it was opened O_WRONLY; ENOMEM,
                views take the whole window.
            ValueError: nothing, or more than one chunk.
        """
        self._check()
        with Naming(self.path):
            if self._dax is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            if self.flags & os.O_ACCMODE == os.O_WRONLY:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            if length is None:
                length = min(CHUNK - offset % CHUNK, self._tree.size(self.node, self.fh) - offset)
            return self._dax.view(self.node, offset, length, writable=self.flags & os.O_ACCMODE == os.O_RDWR)

    # --- changing --------------------------------------------------------------------------------

    def write(self, data: Buffer) -> int:
        """Write at the position (with O_APPEND: at the end), and move it: how many bytes were written."""
        if self.flags & os.O_APPEND:
            self._position = self.stat().st_size
        written = self.pwrite(data, self._position)
        self._position += written
        return written

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write at `offset`: how many bytes were written, which is all of them."""
        self._check(os.O_RDONLY)
        view = memoryview(data).cast("B")
        done = 0
        with Naming(self.path):
            if self._dax is not None and offset + len(view) <= self._tree.size(self.node, self.fh):
                self._dax.write(self.node, offset, view)
                return len(view)
            try:
                while done < len(view):
                    part = view[done : done + self.client.max_write]
                    count = self.client.write(self.node.nodeid, self.fh, part, offset + done, self.flags)
                    if count == 0:
                        raise OSError(errno.EIO, "the server wrote nothing")
                    done += count
            finally:
                self._cache.rule.changed(self.node.slot)
        return done

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long."""
        self._check(os.O_RDONLY)
        with Naming(self.path):
            self._tree.set_attributes(self.node, size=size, fh=self.fh)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate, punch, zero, as fallocate(2); mode is FALLOC_FL_*."""
        self._check(os.O_RDONLY)
        with Naming(self.path):
            try:
                self.client.fallocate(self.node.nodeid, self.fh, mode, offset, length)
            finally:
                self._cache.rule.changed(self.node.slot)

    def fsync(self, *, datasync: bool = False) -> None:
        """Have the server bring the file to its disk; datasync: without attributes."""
        self._check()
        with Naming(self.path):
            self.client.fsync(self.node.nodeid, self.fh, datasync=datasync)

    # --- position and state ----------------------------------------------------------------------

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; whence may be SEEK_DATA and SEEK_HOLE too. Returns the position."""
        self._check()
        with Naming(self.path):
            if whence == os.SEEK_CUR:
                offset += self._position
            elif whence == os.SEEK_END:
                offset += self._tree.attributes(self.node, self.fh).stat.st_size
            elif whence != os.SEEK_SET:
                offset = self.client.lseek(self.node.nodeid, self.fh, offset, whence)
            if offset < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = offset
        return offset

    def tell(self) -> int:
        """The position."""
        return self._position

    def stat(self) -> os.stat_result:
        """As os.fstat()."""
        self._check()
        with Naming(self.path):
            return self._tree.attributes(self.node, self.fh).stat

    def close(self) -> None:
        """Close: FLUSH, whose error is raised, and RELEASE."""
        if self._closed:
            return
        self._closed = True
        with Naming(self.path):
            try:
                if not self._open_flags & OpenFlag.NOFLUSH:
                    self._flush()
            finally:
                self.client.release(self.node.nodeid, self.fh, self.flags)

    def _flush(self) -> None:
        try:
            self.client.flush(self.node.nodeid, self.fh)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise

    def _check(self, forbidden: int = -1) -> None:
        if self._closed or self.flags & os.O_ACCMODE == forbidden:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self.path} was not closed", ResourceWarning, stacklevel=2)
