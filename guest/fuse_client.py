"""FUSE requests as a Linux guest sends them: one method per operation, numbers and names in and out.

Nothing here is cached or remembered, except how often each operation was asked for (`requests`) and what INIT
agreed on. Every method raises OSError with the errno of the reply, and as Transport.exchange() does.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Final, NamedTuple

from coherent_vfs.guest.transport import Buffer, Transport
from coherent_vfs.server.fuse import protocol as p
from coherent_vfs.server.fuse.protocol import Attr, FattrFlag, InitFlag, Kstatfs, Opcode, SetupMappingFlag

MIN_MAX_WRITE: Final = 4096
PAGE: Final = 4096
NO_FH: Final = (1 << 64) - 1
"""In place of a handle, where there is none."""
MAX_MAP_ALIGNMENT: Final = 21
"""Of DAX mappings, log2 of bytes: a chunk's size (fuse_dax_check_alignment)."""
NOTHING: Final = InitFlag(0)

WANTED: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.HANDLE_KILLPRIV
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
)
"""What this client can do, of the flags of INIT."""


class Caller(NamedTuple):
    """On whose behalf requests are sent: the ids and the file mode creation mask of a guest process."""

    uid: int = 0
    gid: int = 0
    umask: int = 0o022


CALLER: Final[ContextVar[Caller]] = ContextVar("caller", default=Caller())  # noqa: B039 (a tuple is immutable)


class Entry(NamedTuple):
    """A reply that names an inode, counting one lookup on it; times to live in seconds.

    Node id 0 is a negative entry: the name does not exist, for as long as entry_ttl.
    """

    nodeid: int
    entry_ttl: float
    attr_ttl: float
    attr: Attr


class DirectoryEntry(NamedTuple):
    """A name in a directory: inode number, cookie of what follows, DT_* type, name."""

    ino: int
    offset: int
    kind: int
    name: bytes


class Opened(NamedTuple):
    """An open file or directory of the server: its handle and FOPEN_* flags."""

    fh: int
    flags: p.OpenFlag


class FuseClient:
    """One FUSE session, from INIT to DESTROY.

    Args:
        transport: carries the messages.
        minor: the newest minor version of the protocol to ask for.
        offered: flags of INIT to offer besides WANTED.

    Attributes:
        before_forget: called with each node id that the server is about to be told to forget.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        minor: int = p.KERNEL_MINOR_VERSION,
        offered: InitFlag = NOTHING,
    ) -> None:
        self.requests: Counter[Opcode] = Counter()
        self.forgotten: list[tuple[int, int]] = []
        self.before_forget: Callable[[int], None] = lambda _: None
        self.transport = transport
        self._uniques = itertools.count(2, 2)
        self._lock = threading.Lock()
        self.flags = InitFlag(0)
        self.max_write = MIN_MAX_WRITE
        self.max_read = transport.max_data
        self.minor = minor
        self._init(minor, WANTED | offered)

    def call(
        self, opcode: Opcode, nodeid: int, arguments: bytes = b"", data: Buffer = b"", reply_bytes: int = 0
    ) -> bytes:
        """Send any request and return what follows the header of its reply."""
        self.send_forgets()
        return self._exchange(opcode, nodeid, arguments, data, reply_bytes)

    def _exchange(self, opcode: Opcode, nodeid: int, arguments: bytes, data: Buffer, reply_bytes: int) -> bytes:
        unique, header = self._header(opcode, nodeid, len(arguments) + len(data))
        reply = self.transport.exchange(header, arguments, data, p.OUT_HEADER.size + reply_bytes)
        if len(reply) < p.OUT_HEADER.size:
            raise OSError(errno.EIO, f"the reply to {opcode.name} is too short")
        length, error, answered = p.OUT_HEADER.unpack_from(reply)
        if answered != unique or length != len(reply) or not -4096 < error <= 0:
            raise OSError(errno.EIO, f"the reply to {opcode.name} is not one")
        if error:
            raise OSError(-error, os.strerror(-error))
        return reply[p.OUT_HEADER.size :]

    def send_forgets(self) -> None:
        """Tell the server what was put on `forgotten`, as (node id, number of lookups)."""
        if not self.forgotten:
            return
        with self._lock:
            batch = self.forgotten[:128]
            # Whatever a node that goes right now puts at the end stays there.
            del self.forgotten[: len(batch)]
        for nodeid, _ in batch:
            self.before_forget(nodeid)
        if len(batch) == 1:
            self._post(Opcode.FORGET, batch[0][0], p.FORGET_IN.pack(batch[0][1]))
        elif batch:
            body = b"".join(itertools.starmap(p.FORGET_ONE.pack, batch))
            self._post(Opcode.BATCH_FORGET, 0, p.BATCH_FORGET_IN.pack(len(batch)) + body)

    def close(self) -> None:
        """End the session (DESTROY), if the server still answers."""
        try:
            while self.forgotten:
                self.send_forgets()
            self.call(Opcode.DESTROY, 0)
        except OSError:
            # A dead server has forgotten the session already.
            return

    # --- names -----------------------------------------------------------------------------------

    def lookup(self, directory: int, name: bytes) -> Entry:
        """LOOKUP. A negative entry that may be cached has node id 0; one that may not raises ENOENT."""
        return self._entry(Opcode.LOOKUP, directory, name + b"\0")

    def mkdir(self, directory: int, name: bytes, mode: int) -> Entry:
        """MKDIR."""
        umask = CALLER.get().umask
        return self._entry(Opcode.MKDIR, directory, p.MKDIR_IN.pack(mode & ~umask, umask) + name + b"\0")

    def mknod(self, directory: int, name: bytes, mode: int, device: int) -> Entry:
        """MKNOD; the device as Linux encodes it for user space."""
        umask = CALLER.get().umask
        return self._entry(Opcode.MKNOD, directory, p.MKNOD_IN.pack(mode & ~umask, device, umask) + name + b"\0")

    def symlink(self, directory: int, name: bytes, target: bytes) -> Entry:
        """SYMLINK."""
        return self._entry(Opcode.SYMLINK, directory, name + b"\0" + target + b"\0")

    def link(self, nodeid: int, directory: int, name: bytes) -> Entry:
        """LINK."""
        return self._entry(Opcode.LINK, directory, p.LINK_IN.pack(nodeid) + name + b"\0")

    def unlink(self, directory: int, name: bytes) -> None:
        """UNLINK."""
        self.call(Opcode.UNLINK, directory, name + b"\0")

    def rmdir(self, directory: int, name: bytes) -> None:
        """RMDIR."""
        self.call(Opcode.RMDIR, directory, name + b"\0")

    def rename(self, directory: int, name: bytes, to_directory: int, to_name: bytes, flags: int) -> None:
        """RENAME, or RENAME2 where there are flags."""
        names = name + b"\0" + to_name + b"\0"
        if flags:
            self.call(Opcode.RENAME2, directory, p.RENAME2_IN.pack(to_directory, flags) + names)
        else:
            self.call(Opcode.RENAME, directory, p.RENAME_IN.pack(to_directory) + names)

    # --- inodes ----------------------------------------------------------------------------------

    def getattr(self, nodeid: int, fh: int | None = None) -> tuple[float, Attr]:
        """GETATTR: time to live in seconds, attributes."""
        body = p.GETATTR_IN.pack(0, 0) if fh is None else p.GETATTR_IN.pack(p.GETATTR_FH, fh)
        return self._attributes(Opcode.GETATTR, nodeid, body)

    def setattr(
        self,
        nodeid: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        times_ns: tuple[int | None, int | None] | None = None,
        fh: int | None = None,
    ) -> tuple[float, Attr]:
        """SETATTR of what is given; times_ns is access and modification time, None there meaning now."""
        valid = FattrFlag(0)
        times: list[tuple[int, int]] = [(0, 0), (0, 0)]
        for flag, value in zip(
            (FattrFlag.MODE, FattrFlag.UID, FattrFlag.GID, FattrFlag.SIZE, FattrFlag.FH),
            (mode, uid, gid, size, fh),
            strict=True,
        ):
            if value is not None:
                valid |= flag
        if times_ns is not None:
            valid |= FattrFlag.ATIME | FattrFlag.MTIME
            for index, now in enumerate((FattrFlag.ATIME_NOW, FattrFlag.MTIME_NOW)):
                time_ns = times_ns[index]
                if time_ns is None:
                    valid |= now
                else:
                    times[index] = divmod(time_ns, 1_000_000_000)
        (atime, atimensec), (mtime, mtimensec) = times
        body = p.SETATTR_IN.pack(
            *(valid, fh or 0, size or 0, 0),
            *(atime, mtime, 0, atimensec, mtimensec, 0),
            *(mode or 0, uid or 0, gid or 0),
        )
        return self._attributes(Opcode.SETATTR, nodeid, body)

    def readlink(self, nodeid: int) -> bytes:
        """READLINK."""
        return self.call(Opcode.READLINK, nodeid, reply_bytes=p.SYMLINK_MAX + 1)

    def access(self, nodeid: int, mask: int) -> None:
        """ACCESS."""
        self.call(Opcode.ACCESS, nodeid, p.ACCESS_IN.pack(mask))

    def statfs(self, nodeid: int) -> Kstatfs:
        """STATFS."""
        return Kstatfs._make(p.KSTATFS.unpack(self._sized(Opcode.STATFS, nodeid, b"", p.KSTATFS.size)))

    def syncfs(self) -> None:
        """SYNCFS."""
        self.call(Opcode.SYNCFS, p.ROOT_ID, p.SYNCFS_IN.pack())

    # --- extended attributes ---------------------------------------------------------------------

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        """SETXATTR; flags are XATTR_CREATE or XATTR_REPLACE."""
        if InitFlag.SETXATTR_EXT in self.flags:
            body = p.SETXATTR_IN.pack(len(value), flags, 0)
        else:
            body = p.SETXATTR_IN_SHORT.pack(len(value), flags)
        self.call(Opcode.SETXATTR, nodeid, body + name + b"\0", value)

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        """GETXATTR."""
        body = p.GETXATTR_IN.pack(p.XATTR_SIZE_MAX) + name + b"\0"
        return self.call(Opcode.GETXATTR, nodeid, body, reply_bytes=p.XATTR_SIZE_MAX)

    def listxattr(self, nodeid: int) -> list[bytes]:
        """LISTXATTR."""
        body = p.GETXATTR_IN.pack(p.XATTR_LIST_MAX)
        return self.call(Opcode.LISTXATTR, nodeid, body, reply_bytes=p.XATTR_LIST_MAX).split(b"\0")[:-1]

    def removexattr(self, nodeid: int, name: bytes) -> None:
        """REMOVEXATTR."""
        self.call(Opcode.REMOVEXATTR, nodeid, name + b"\0")

    # --- open files ------------------------------------------------------------------------------

    def open(self, nodeid: int, flags: int) -> Opened:
        """OPEN."""
        return self._opened(self._sized(Opcode.OPEN, nodeid, p.OPEN_IN.pack(flags, 0), p.OPEN_OUT.size))

    def create(self, directory: int, name: bytes, flags: int, mode: int) -> tuple[Entry, Opened]:
        """CREATE."""
        return self._created(Opcode.CREATE, directory, name, flags, mode)

    def tmpfile(self, directory: int, flags: int, mode: int) -> tuple[Entry, Opened]:
        """TMPFILE: a file without a name."""
        return self._created(Opcode.TMPFILE, directory, b"/", flags, mode)

    def read(self, nodeid: int, fh: int, size: int, offset: int, flags: int = 0) -> bytes:
        """READ of at most max_read bytes."""
        return self.call(Opcode.READ, nodeid, p.READ_IN.pack(fh, offset, size, 0, 0, flags), reply_bytes=size)

    def write(self, nodeid: int, fh: int, data: Buffer, offset: int, flags: int = 0) -> int:
        """WRITE of at most max_write bytes: how many were written."""
        body = p.WRITE_IN.pack(fh, offset, len(data), 0, 0, flags)
        written = self._sized(Opcode.WRITE, nodeid, body, p.WRITE_OUT.size, data)
        return self._at_most(len(data), p.WRITE_OUT.unpack(written)[0])

    def flush(self, nodeid: int, fh: int) -> None:
        """FLUSH."""
        self.call(Opcode.FLUSH, nodeid, p.FLUSH_IN.pack(fh, 0))

    def release(self, nodeid: int, fh: int, flags: int) -> None:
        """RELEASE."""
        self.call(Opcode.RELEASE, nodeid, p.RELEASE_IN.pack(fh, flags, 0, 0))

    def fsync(self, nodeid: int, fh: int, *, datasync: bool = False) -> None:
        """FSYNC."""
        self.call(Opcode.FSYNC, nodeid, p.FSYNC_IN.pack(fh, p.FSYNC_FDATASYNC if datasync else 0))

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        """LSEEK, for SEEK_DATA and SEEK_HOLE."""
        body = p.LSEEK_IN.pack(fh, offset, whence)
        return int(p.LSEEK_OUT.unpack(self._sized(Opcode.LSEEK, nodeid, body, p.LSEEK_OUT.size))[0])

    def fallocate(self, nodeid: int, fh: int, mode: int, offset: int, length: int) -> None:
        """FALLOCATE."""
        self.call(Opcode.FALLOCATE, nodeid, p.FALLOCATE_IN.pack(fh, offset, length, mode))

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, to_nodeid: int, to_fh: int, to_offset: int, length: int
    ) -> int:
        """COPY_FILE_RANGE: how many bytes were copied."""
        body = p.COPY_FILE_RANGE_IN.pack(fh, offset, to_nodeid, to_fh, to_offset, length, 0)
        copied = self._sized(Opcode.COPY_FILE_RANGE, nodeid, body, p.WRITE_OUT.size)
        return self._at_most(length, p.WRITE_OUT.unpack(copied)[0])

    # --- the window ------------------------------------------------------------------------------

    # These send no FORGET along, for which chunks may have to go: they are sent in the middle of arranging those.

    def setup_mapping(self, nodeid: int, offset: int, length: int, moffset: int, *, writable: bool) -> None:
        """SETUPMAPPING of a range of a file at a moffset of the window."""
        flags = SetupMappingFlag.READ | (SetupMappingFlag.WRITE if writable else 0)
        body = p.SETUPMAPPING_IN.pack(NO_FH, offset, length, flags, moffset)
        self._exchange(Opcode.SETUPMAPPING, nodeid, body, b"", 0)

    def remove_mappings(self, nodeid: int, ranges: Sequence[tuple[int, int]]) -> None:
        """REMOVEMAPPING of ranges of the window, each a moffset and a length."""
        body = p.REMOVEMAPPING_IN.pack(len(ranges)) + b"".join(itertools.starmap(p.REMOVEMAPPING_ONE.pack, ranges))
        self._exchange(Opcode.REMOVEMAPPING, nodeid, body, b"", 0)

    # --- directories -----------------------------------------------------------------------------

    def opendir(self, nodeid: int) -> Opened:
        """OPENDIR."""
        body = p.OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0)
        return self._opened(self._sized(Opcode.OPENDIR, nodeid, body, p.OPEN_OUT.size))

    def readdir(self, nodeid: int, fh: int, offset: int, size: int) -> list[DirectoryEntry]:
        """READDIR from a cookie on; an empty list is the end."""
        reply = self.call(Opcode.READDIR, nodeid, p.READ_IN.pack(fh, offset, size, 0, 0, 0), reply_bytes=size)
        return [entry for _, entry in self._directory(reply, 0)]

    def readdirplus(self, nodeid: int, fh: int, offset: int, size: int) -> list[tuple[Entry, DirectoryEntry]]:
        """READDIRPLUS from a cookie on. An entry of node id 0 was not looked up."""
        body = p.READ_IN.pack(fh, offset, size, 0, 0, 0)
        reply = self.call(Opcode.READDIRPLUS, nodeid, body, reply_bytes=size)
        return [(decode_entry(reply, start), entry) for start, entry in self._directory(reply, p.ENTRY_OUT_SIZE)]

    def fsyncdir(self, nodeid: int, fh: int, *, datasync: bool = False) -> None:
        """FSYNCDIR."""
        self.call(Opcode.FSYNCDIR, nodeid, p.FSYNC_IN.pack(fh, p.FSYNC_FDATASYNC if datasync else 0))

    def releasedir(self, nodeid: int, fh: int) -> None:
        """RELEASEDIR."""
        self.call(Opcode.RELEASEDIR, nodeid, p.RELEASE_IN.pack(fh, 0, 0, 0))

    def interrupt(self, unique: int) -> None:
        """INTERRUPT of the request with that number."""
        self._post(Opcode.INTERRUPT, 0, p.INTERRUPT_IN.pack(unique))

    # --- coding ----------------------------------------------------------------------------------

    def _init(self, minor: int, wanted: InitFlag) -> None:
        if minor >= 36:
            body = p.INIT_IN.pack(p.KERNEL_VERSION, minor, 1 << 20, wanted & 0xFFFFFFFF, wanted >> 32)
        else:
            flags = wanted & ~InitFlag.INIT_EXT & 0xFFFFFFFF
            body = p.INIT_IN_SHORT.pack(p.KERNEL_VERSION, minor, 1 << 20, flags)
        reply = p.InitOut._make(p.INIT_OUT.unpack(self._sized(Opcode.INIT, 0, body, p.INIT_OUT.size)))
        if reply.major != p.KERNEL_VERSION:
            raise OSError(errno.EPROTO, f"the server speaks FUSE {reply.major}.{reply.minor}")
        self.minor = min(minor, reply.minor)
        self.flags = InitFlag(reply.flags)
        if InitFlag.INIT_EXT in self.flags:
            self.flags |= InitFlag(reply.flags2 << 32)
        if InitFlag.MAP_ALIGNMENT in self.flags and reply.map_alignment > MAX_MAP_ALIGNMENT:
            raise OSError(errno.EPROTO, f"the server maps in units of 2^{reply.map_alignment} bytes")
        self.max_write = min(max(reply.max_write, MIN_MAX_WRITE), self.transport.max_data)
        if InitFlag.MAX_PAGES in self.flags:
            self.max_read = min(max(reply.max_pages, 1) * PAGE, self.transport.max_data)
        else:
            self.max_read = min(32 * PAGE, self.transport.max_data)
        self.max_write = min(self.max_write, self.max_read)

    def _header(self, opcode: Opcode, nodeid: int, length: int) -> tuple[int, bytes]:
        self.requests[opcode] += 1
        unique = next(self._uniques)
        caller = CALLER.get()
        return unique, p.IN_HEADER.pack(
            p.IN_HEADER.size + length, opcode, unique, nodeid, caller.uid, caller.gid, os.getpid(), 0
        )

    def _post(self, opcode: Opcode, nodeid: int, arguments: bytes) -> None:
        self.transport.post(self._header(opcode, nodeid, len(arguments))[1], arguments)

    def _sized(self, opcode: Opcode, nodeid: int, arguments: bytes, size: int, data: Buffer = b"") -> bytes:
        reply = self.call(opcode, nodeid, arguments, data, size)
        if len(reply) < size:
            raise OSError(errno.EIO, f"the reply to {opcode.name} is too short")
        return reply

    def _entry(self, opcode: Opcode, nodeid: int, arguments: bytes) -> Entry:
        return decode_entry(self._sized(opcode, nodeid, arguments, p.ENTRY_OUT_SIZE), 0)

    def _attributes(self, opcode: Opcode, nodeid: int, arguments: bytes) -> tuple[float, Attr]:
        reply = self._sized(opcode, nodeid, arguments, p.ATTR_OUT_SIZE)
        seconds, nanoseconds = p.ATTR_OUT.unpack_from(reply)
        return seconds + nanoseconds / 1e9, Attr._make(p.ATTR.unpack_from(reply, p.ATTR_OUT.size))

    def _opened(self, reply: bytes) -> Opened:
        fh, flags, _ = p.OPEN_OUT.unpack_from(reply)
        return Opened(fh, p.OpenFlag(flags))

    def _created(self, opcode: Opcode, nodeid: int, name: bytes, flags: int, mode: int) -> tuple[Entry, Opened]:
        umask = CALLER.get().umask
        body = p.CREATE_IN.pack(flags, mode & ~umask, umask, 0) + name + b"\0"
        reply = self._sized(opcode, nodeid, body, p.ENTRY_OUT_SIZE + p.OPEN_OUT.size)
        return decode_entry(reply, 0), self._opened(reply[p.ENTRY_OUT_SIZE :])

    def _directory(self, reply: bytes, header: int) -> Iterator[tuple[int, DirectoryEntry]]:
        at = 0
        while at + header + p.DIRENT.size <= len(reply):
            ino, offset, length, kind = p.DIRENT.unpack_from(reply, at + header)
            start = at + header + p.DIRENT.size
            if length == 0 or start + length > len(reply):
                raise OSError(errno.EIO, "a directory entry is broken")
            yield at, DirectoryEntry(ino, offset, kind, reply[start : start + length])
            at += (header + p.DIRENT.size + length + 7) & ~7

    def _at_most(self, asked: int, done: int) -> int:
        if done > asked:
            raise OSError(errno.EIO, f"the server claims to have written {done} of {asked} bytes")
        return done


def decode_entry(reply: bytes, start: int) -> Entry:
    """The fuse_entry_out at an offset of a reply."""
    entry = p.EntryOut._make(p.ENTRY_OUT.unpack_from(reply, start))
    attr = Attr._make(p.ATTR.unpack_from(reply, start + p.ENTRY_OUT.size))
    return Entry(
        entry.nodeid,
        entry.entry_valid + entry.entry_valid_nsec / 1e9,
        entry.attr_valid + entry.attr_valid_nsec / 1e9,
        attr,
    )
