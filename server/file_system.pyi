from collections.abc import Iterable
from contextlib import AbstractContextManager

from coherence.leases import Leases
from coherence.table import Journal, Table
from server.changes import Changes
from server.handles import HandleTable
from server.inodes import InodeTable
from server.settings import Settings
from server.validity import Validity

class Request:
    opcode: int
    nodeid: int
    unique: int
    uid: int
    gid: int
    pid: int
    body: bytes
    reply_size: int

class FileSystem:
    settings: Settings
    readonly: bool
    xattr: bool
    writeback: bool
    allow_direct_io: bool
    initialized: bool
    aware: bool
    inodes: InodeTable
    handles: HandleTable
    changes: Changes
    validity: Validity
    def __init__(
        self,
        settings: Settings,
        table: Table | None = None,
        journal: Journal | None = None,
        leases: Leases | None = None,
    ) -> None: ...
    def reset(self) -> None: ...
    def prove_aware(self, value: bytes) -> None: ...
    @property
    def requests(self) -> dict[int, int]: ...
    def fd(self, nodeid: int) -> int: ...
    def handle_fd(self, nodeid: int, fh: int, writable: bool = ...) -> int: ...
    def entry(self, parent: int, name: bytes) -> bytes: ...
    def entry_fd(self, fd: int, parent: int = ..., name: bytes = ...) -> bytes: ...
    def attr_out(self, nodeid: int) -> bytes: ...
    def is_stale(self, nodeid: int) -> bool: ...
    def spoil(self, nodeid: int) -> None: ...
    def reopen(self, nodeid: int, flags: int) -> int: ...
    def open_handle(self, nodeid: int, fd: int) -> bytes: ...
    def credentials(self, uid: int, gid: int) -> AbstractContextManager[None]: ...
    def without_fsetid(self) -> AbstractContextManager[None]: ...
    def changing(
        self, *, inodes: Iterable[int] = (), names: Iterable[tuple[int, bytes]] = (), data: bool = ...
    ) -> AbstractContextManager[None]: ...
