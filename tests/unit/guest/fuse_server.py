"""A FUSE server in memory, behind a Transport: it counts lookups, and answers as a test wants."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from coherent_vfs.guest.transport import Buffer
from coherent_vfs.server.fuse import protocol as p
from coherent_vfs.server.fuse.protocol import Opcode, OpenFlag


@dataclass
class Inode:
    """A file, a directory or a symbolic link."""

    mode: int
    data: bytes = b""
    children: dict[bytes, int] = field(default_factory=dict)
    mtime: int = 1
    lookups: int = 0


class FuseServer:
    """The transport and the server.

    Attributes:
        ttl: seconds that names and attributes are valid.
        negative: answer for missing names with a node id of 0, to be kept for ttl.
        open_flags, opendir_flags: what OPEN and OPENDIR answer.
        spoil: changes each reply before it goes out.
    """

    max_data = 1 << 20

    def __init__(self) -> None:
        self.inodes = {p.ROOT_ID: Inode(stat.S_IFDIR | 0o755)}
        self.ttl = 1000
        self.negative = False
        self.open_flags = OpenFlag.KEEP_CACHE
        self.opendir_flags = OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR
        self.init_flags = p.InitFlag.AUTO_INVAL_DATA | p.InitFlag.DO_READDIRPLUS | p.InitFlag.MAX_PAGES
        self.spoil: Callable[[Opcode, bytes], bytes] = lambda _, reply: reply
        self.minor = p.KERNEL_MINOR_VERSION
        self.destroyed = False
        self._next = 10

    def add(self, name: str, data: bytes = b"", mode: int = stat.S_IFREG | 0o644, parent: int = 1) -> int:
        """Make an inode, behind the guest's back; its node id."""
        self._next += 1
        self.inodes[self._next] = Inode(mode, data)
        self.inodes[parent].children[name.encode()] = self._next
        return self._next

    def exchange(self, header: bytes, arguments: bytes, data: Buffer, reply_bytes: int) -> bytes:
        """As Transport.exchange()."""
        request = p.InHeader._make(p.IN_HEADER.unpack(header))
        assert request.len == len(header) + len(arguments) + len(data)
        opcode = Opcode(request.opcode)
        try:
            body = getattr(self, f"_{opcode.name.lower()}")(request.nodeid, arguments + bytes(data))
            error = 0
        except OSError as failure:
            body, error = b"", -(failure.errno or errno.EIO)
        size = p.OUT_HEADER.size + len(body)
        assert size <= reply_bytes
        return self.spoil(opcode, p.OUT_HEADER.pack(size, error, request.unique) + body)

    def post(self, header: bytes, arguments: bytes) -> None:
        """As Transport.post()."""
        request = p.InHeader._make(p.IN_HEADER.unpack(header))
        if request.opcode == Opcode.FORGET:
            self._forget(request.nodeid, *p.FORGET_IN.unpack(arguments))
        elif request.opcode == Opcode.BATCH_FORGET:
            for one in p.FORGET_ONE.iter_unpack(arguments[p.BATCH_FORGET_IN.size :]):
                self._forget(*one)

    def close(self) -> None:
        """As Transport.close()."""

    def _forget(self, nodeid: int, lookups: int) -> None:
        assert 0 < lookups <= self.inodes[nodeid].lookups
        self.inodes[nodeid].lookups -= lookups

    def _inode(self, nodeid: int) -> Inode:
        inode = self.inodes[nodeid]
        if not inode.lookups and nodeid != p.ROOT_ID:
            raise OSError(errno.ESTALE, "the guest has forgotten this")
        return inode

    def _attr(self, nodeid: int) -> bytes:
        inode = self.inodes[nodeid]
        attr = p.Attr(nodeid, len(inode.data), 0, 0, inode.mtime, 0, 0, 0, 0, inode.mode, 1, 0, 0, 0, 4096, 0)
        return p.ATTR.pack(*attr)

    def _entry(self, nodeid: int) -> bytes:
        if nodeid:
            self.inodes[nodeid].lookups += 1
        attr = self._attr(nodeid) if nodeid else bytes(p.ATTR.size)
        return p.ENTRY_OUT.pack(nodeid, 0, self.ttl, self.ttl, 0, 0) + attr

    def _init(self, _: int, __: bytes) -> bytes:
        return p.INIT_OUT.pack(7, self.minor, 0, self.init_flags, 0, 0, 1 << 20, 1, 256, 0, 0, 0, 0)

    def _destroy(self, _: int, __: bytes) -> bytes:
        self.destroyed = True
        return b""

    def _setxattr(self, _: int, __: bytes) -> bytes:
        return b""

    def _lookup(self, nodeid: int, body: bytes) -> bytes:
        child = self._inode(nodeid).children.get(body.rstrip(b"\0"))
        if child is None and not self.negative:
            raise OSError(errno.ENOENT, "")
        return self._entry(child or 0)

    def _getattr(self, nodeid: int, _: bytes) -> bytes:
        self._inode(nodeid)
        return p.ATTR_OUT.pack(self.ttl, 0) + self._attr(nodeid)

    def _readlink(self, nodeid: int, _: bytes) -> bytes:
        return self._inode(nodeid).data

    def _unlink(self, nodeid: int, body: bytes) -> bytes:
        if self._inode(nodeid).children.pop(body.rstrip(b"\0"), None) is None:
            raise OSError(errno.ENOENT, "")
        return b""

    def _mkdir(self, nodeid: int, body: bytes) -> bytes:
        name = body[p.MKDIR_IN.size :].rstrip(b"\0")
        return self._entry(self.add(name.decode(), mode=stat.S_IFDIR | 0o755, parent=nodeid))

    def _open(self, nodeid: int, _: bytes) -> bytes:
        self._inode(nodeid)
        return p.OPEN_OUT.pack(nodeid, self.open_flags, 0)

    def _opendir(self, nodeid: int, _: bytes) -> bytes:
        self._inode(nodeid)
        return p.OPEN_OUT.pack(nodeid, self.opendir_flags, 0)

    def _flush(self, _: int, __: bytes) -> bytes:
        raise OSError(errno.ENOSYS, "")

    def _release(self, _: int, __: bytes) -> bytes:
        return b""

    _releasedir = _release

    def _read(self, nodeid: int, body: bytes) -> bytes:
        _, offset, size, *_ = p.READ_IN.unpack(body)
        return self._inode(nodeid).data[offset : offset + size]

    def _write(self, nodeid: int, body: bytes) -> bytes:
        _, offset, size, *_ = p.WRITE_IN.unpack_from(body)
        inode = self._inode(nodeid)
        inode.data = inode.data[:offset] + body[p.WRITE_IN.size :] + inode.data[offset + size :]
        return p.WRITE_OUT.pack(size)

    def _readdir(self, nodeid: int, body: bytes) -> bytes:
        return self._list(nodeid, body, lambda _: b"")

    def _readdirplus(self, nodeid: int, body: bytes) -> bytes:
        return self._list(nodeid, body, self._entry)

    def _list(self, nodeid: int, body: bytes, prefix: Callable[[int], bytes]) -> bytes:
        _, start, size, *_ = p.READ_IN.unpack(body)
        reply = b""
        for offset, (name, child) in enumerate(self._inode(nodeid).children.items()):
            room = len(prefix(0)) + p.dirent_size(len(name)) if prefix(0) else p.dirent_size(len(name))
            if offset < start or len(reply) + room > size:
                continue
            kind = self.inodes[child].mode >> 12
            entry = prefix(child) + p.DIRENT.pack(child, offset + 1, len(name), kind) + name
            reply += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
        return reply
