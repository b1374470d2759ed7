"""A share for the tests of single operations: a directory, and the core's file system in a few lines."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server.fuse.protocol import ATTR, ATTR_OUT, ENTRY_OUT, OPEN_OUT, ROOT_ID, Attr, EntryOut, Opcode
from server.operations import OPERATIONS


@dataclass
class Call:
    """A request."""

    opcode: int
    nodeid: int
    body: bytes
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    pid: int = 1
    unique: int = 1
    reply_size: int = 1 << 20


@dataclass(frozen=True)
class Change:
    """What an operation announced."""

    inodes: frozenset[int]
    names: frozenset[tuple[int, bytes]]


def encoded(st: os.stat_result) -> bytes:
    times = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    return ATTR.pack(
        *(st.st_ino, st.st_size, st.st_blocks),
        *(each // 10**9 for each in times),
        *(each % 10**9 for each in times),
        *(st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF, st.st_blksize, 0),
    )


class Share:
    """server.operations.request.FileSystem over a directory; node ids are 1, 2, ... in order of look-up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.readonly = False
        self.xattr = True
        self.writeback = False
        self.changes: list[Change] = []
        self.proofs: list[bytes] = []
        self.fsetid = True
        self._fds = {ROOT_ID: os.open(root, os.O_PATH)}
        self._handles: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        for fd in [*self._fds.values(), *(fd for _, fd in self._handles.values())]:
            os.close(fd)

    # --- what tests do

    def call(self, opcode: Opcode, nodeid: int, body: bytes = b"", **caller: int) -> bytes:
        """Serve a request; caller: uid, gid."""
        return OPERATIONS[opcode](self, Call(opcode, nodeid, body, **caller))

    def nodeid(self, name: str) -> int:
        """Look up a name in the root."""
        return entry(self.entry(ROOT_ID, name.encode()))[0].nodeid

    def open(self, name: str, flags: int = os.O_RDWR) -> tuple[int, int]:
        """Open a name in the root: node id and handle."""
        nodeid = self.nodeid(name)
        return nodeid, OPEN_OUT.unpack(self.open_handle(nodeid, self.reopen(nodeid, flags), flags))[0]

    # --- what operations use

    def fd(self, nodeid: int) -> int:
        try:
            return self._fds[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "stale") from None

    def handle_fd(self, nodeid: int, fh: int) -> int:
        owner, fd = self._handles.get(fh, (None, -1))
        if owner != nodeid:
            raise OSError(errno.EBADF, "no such handle")
        return fd

    def entry(self, parent: int, name: bytes) -> bytes:
        return self._known(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.fd(parent)))

    def entry_fd(self, fd: int) -> bytes:
        return self._known(os.open(f"/proc/self/fd/{fd}", os.O_PATH))

    def _known(self, fd: int) -> bytes:
        nodeid = next((each for each, known in self._fds.items() if os.path.sameopenfile(fd, known)), 0)
        if nodeid:
            os.close(fd)
        else:
            nodeid = len(self._fds) + 1
            self._fds[nodeid] = fd
        return ENTRY_OUT.pack(*EntryOut(nodeid, 0, 0, 0, 0, 0)) + encoded(os.fstat(self._fds[nodeid]))

    def attr_out(self, nodeid: int) -> bytes:
        return ATTR_OUT.pack(0, 0) + encoded(os.fstat(self.fd(nodeid)))

    def open_handle(self, nodeid: int, fd: int, flags: int) -> bytes:
        fh = 0x5EED0000C0FFEE00 + len(self._handles)
        self._handles[fh] = nodeid, fd
        return OPEN_OUT.pack(fh, 0, 0)

    def reopen(self, nodeid: int, flags: int) -> int:
        return os.open(f"/proc/self/fd/{self.fd(nodeid)}", flags)

    @contextmanager
    def credentials(self, uid: int, gid: int) -> Iterator[None]:
        before = os.geteuid(), os.getegid()
        os.setegid(gid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(before[0])
            os.setegid(before[1])

    @contextmanager
    def without_fsetid(self) -> Iterator[None]:
        self.fsetid = False
        yield

    @contextmanager
    def changing(
        self, *, inodes: Iterable[int] = (), names: Iterable[tuple[int, bytes]] = ()
    ) -> Iterator[None]:
        self.changes.append(Change(frozenset(inodes), frozenset(names)))
        yield

    def prove_aware(self, value: bytes) -> None:
        if value != b"right":
            raise OSError(errno.EPERM, "wrong proof")
        self.proofs.append(value)


def entry(reply: bytes) -> tuple[EntryOut, Attr]:
    """Decode a fuse_entry_out."""
    return (
        EntryOut._make(ENTRY_OUT.unpack_from(reply)),
        Attr._make(ATTR.unpack_from(reply, ENTRY_OUT.size)),
    )


def attr(reply: bytes) -> Attr:
    """Decode a fuse_attr_out."""
    return Attr._make(ATTR.unpack_from(reply, ATTR_OUT.size))
