"""A share for the tests of single operations: a directory served by the real file system, without rings."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from coherent_vfs.server.fuse.protocol import ATTR, ATTR_OUT, ENTRY_OUT, OPEN_OUT, ROOT_ID, Attr, EntryOut, Opcode
from coherent_vfs.server.operations.table import PYTHON
from coherent_vfs.server.session.file_system import FileSystem
from coherent_vfs.server.session.request import Request
from coherent_vfs.server.settings import Settings


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


class Share:
    """A server.session.file_system.FileSystem over a directory: the real one, and a record of what it was asked.

    Attributes:
        readonly, xattr, writeback: as of the settings; may be set.
        changes: what was announced.
        proofs: of awareness that were right.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.readonly = False
        self.xattr = True
        self.writeback = False
        self.changes: list[Change] = []
        self.proofs: list[bytes] = []
        root_fd = os.open(root, os.O_PATH)
        self._fs = FileSystem(Settings(shared_dir=root, root_fd=root_fd))
        os.close(root_fd)

    def close(self) -> None:
        """Close everything that the session opened."""
        self._fs.reset()

    # --- what tests do

    def call(self, opcode: Opcode, nodeid: int, body: bytes = b"", **caller: int) -> bytes:
        """Serve a request; caller: uid, gid."""
        return self.serve(Call(opcode, nodeid, body, **caller))

    def serve(self, call: Call) -> bytes:
        """Serve a request."""
        return PYTHON[call.opcode](cast(FileSystem, self), cast(Request, call))

    def nodeid(self, name: str) -> int:
        """Look up a name in the root."""
        return entry(self.entry(ROOT_ID, name.encode()))[0].nodeid

    def open(self, name: str, flags: int = os.O_RDWR) -> tuple[int, int]:
        """Open a name in the root: node id and handle."""
        nodeid = self.nodeid(name)
        return nodeid, OPEN_OUT.unpack(self.open_handle(nodeid, self.reopen(nodeid, flags)))[0]

    # --- what operations use

    def fd(self, nodeid: int) -> int:
        return self._fs.fd(nodeid)

    def handle_fd(self, nodeid: int, fh: int, writable: bool = False) -> int:
        return self._fs.handle_fd(nodeid, fh, writable)

    def entry(self, parent: int, name: bytes) -> bytes:
        return self._fs.entry(parent, name)

    def entry_fd(self, fd: int, parent: int = 0, name: bytes = b"") -> bytes:
        return self._fs.entry_fd(fd, parent, name)

    def attr_out(self, nodeid: int) -> bytes:
        return self._fs.attr_out(nodeid)

    window: None = None

    def reaches(self, nodeid: int, size: int) -> None:
        self._fs.reaches(nodeid, size)

    def truncating(self, unique: int, nodeid: int, size: int) -> AbstractContextManager[None]:
        return self._fs.truncating(unique, nodeid, size)

    def confirm_truncation(self, unique: int) -> None:
        self._fs.confirm_truncation(unique)

    def is_stale(self, nodeid: int) -> bool:
        return self._fs.is_stale(nodeid)

    def force_invalidation(self, nodeid: int) -> None:
        self._fs.force_invalidation(nodeid)

    def open_handle(self, nodeid: int, fd: int) -> bytes:
        return self._fs.open_handle(nodeid, fd)

    def reopen(self, nodeid: int, flags: int) -> int:
        return self._fs.reopen(nodeid, flags)

    def credentials(self, uid: int, gid: int) -> AbstractContextManager[None]:
        return self._fs.credentials(uid, gid)

    def without_fsetid(self) -> AbstractContextManager[None]:
        return self._fs.without_fsetid()

    @contextmanager
    def changing(
        self, *, inodes: Iterable[int] = (), names: Iterable[tuple[int, bytes]] = (), data: bool = False
    ) -> Iterator[None]:
        self.changes.append(Change(frozenset(inodes), frozenset(names)))
        yield

    def prove_aware(self, value: bytes) -> None:
        if value != b"right":
            raise PermissionError(1, "wrong proof")
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
