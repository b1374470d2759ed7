"""Types of table.pyx."""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SLOTS_OFFSET: int
DEFAULT_SLOT_COUNT: int
MIN_SLOT_COUNT: int
MAX_SLOT_COUNT: int
ROOT_BITS: int
ABI_VERSION: int
TRUST_NOTHING: int
JOURNAL_MAX: int
JOURNAL_BYTES: int

def check_header(header: bytes, size: int, what: str) -> None:
    """Refuse a table that this program cannot use.

    Args:
        header: the first SLOTS_OFFSET bytes of the file.
        size: the file's size in bytes.
        what: how the error calls the table.

    Raises:
        UserError: not a table, another ABI version, a bad slot count, or a file too short for it.
    """

class JournalContent(NamedTuple):
    """What a journal says.

    Attributes:
        domain: of its table.
        backend_id: its backend's number in the lease table.
        changes: how many changes its backend has made.
        announced: the slots that its backend may be changing; None: more than fit, so any.
    """

    domain: bytes
    backend_id: int
    changes: int
    announced: tuple[int, ...] | None

def journal_content(domain: bytes, backend_id: int) -> bytes:
    """The content of a new journal, for the table with this domain and the backend with this number."""

def parse_journal(content: bytes) -> JournalContent:
    """What a journal's content says. UserError when it is not a journal of this version."""

class Table:
    """A mapped version table. Slots are integers from 0 to slot_count - 1, stamps are values of sequence."""

    @staticmethod
    def create(name: str, slot_count: int = ..., *, mode: int = 0o600) -> Table:
        """Make the shared memory object `name` ("vt") and map it writable.

        Args:
            name: a shared memory name, without further slashes.
            slot_count: a power of two from MIN_SLOT_COUNT to MAX_SLOT_COUNT.
            mode: permission bits of the file.

        Raises:
            UserError: the name is taken or bad, the count is bad, or there is no memory for it.
        """

    @staticmethod
    def open(path_or_name: str | os.PathLike[str], writable: bool = False) -> Table:
        """Map a table that exists, by its name ("vt") or its path.

        Raises:
            UserError: it is missing, not permitted, or check_header refuses it.
        """

    @staticmethod
    def from_fd(fd: int, writable: bool = False, what: str = "the version table") -> Table:
        """Map the table of a file descriptor, which the caller goes on owning. Errors as in open."""

    def close(self) -> None:
        """Unmap. Compiled code that still uses `vt` would touch unmapped memory."""

    @property
    def writable(self) -> bool: ...
    @property
    def slot_count(self) -> int: ...
    @property
    def bits(self) -> int:
        """log2 of slot_count."""

    @property
    def domain(self) -> bytes:
        """16 random bytes that identify the domain: who can quote them has mapped the table."""

    @property
    def sequence(self) -> int: ...
    @property
    def floor(self) -> int: ...
    @property
    def root_bits(self) -> frozenset[int]:
        """The slots of shares' roots, modulo ROOT_BITS; some may be of shares that are no more."""

    @property
    def root_epoch(self) -> int:
        """How often a bit was added to root_bits: a change that sees two values may have missed a root."""

    def add_root(self, slot: int) -> None:
        """Let whoever bumps this inode slot bump slot 1 as well; only coherenced does."""

    def keep_roots(self, slots: Iterable[int]) -> None:
        """Forget all roots but these; only coherenced does, and only after it has raised the floor.

        A guest of a forgotten share whose backend has ended has then nothing left that is good, and can fetch nothing.
        """

    def inode_hash(self, dev: int, ino: int) -> int:
        """The hash of an inode, of whose low bits its slot is made: 64 bits."""

    def inode_slot(self, dev: int, ino: int) -> int:
        """The slot of an inode: st_dev and st_ino."""

    def name_slot(self, dir_slot: int, name: bytes | bytearray | memoryview) -> int:
        """The slot of a name (bytes, no slash) in the directory with this inode slot."""

    def siphash(self, first: int, data: bytes | bytearray | memoryview) -> int:
        """SipHash-2-4 under the table's seed of `first`, as 8 little-endian bytes, and `data`: 64 bits."""

    def is_root(self, slot: int) -> bool:
        """Whether the slot may be that of a share's root: whoever bumps it bumps slot 1 as well."""

    def bump(self, slot: int) -> int:
        """Note that what depends on the slot has changed; returns the new sequence.

        Raises:
            IndexError: no such slot.
            PermissionError: the table is mapped read-only.
        """

    def pin(self, slot: int) -> None:
        """Make what depends on the slot never good, however often it is bumped, until Leases.unpin.

        Raises: as bump().
        """

    def pinned(self) -> list[int]:
        """The slots that are pinned."""

    def stamp(self) -> int:
        """The sequence; to be read before the request that fetches the thing is sent."""

    def valid(self, slot: int, stamp: int) -> bool:
        """Whether a thing that depends on the slot and was fetched under this stamp is still good."""

    def slot(self, index: int) -> int:
        """The value of a slot."""

    def slots_above_sequence(self) -> int:
        """How many slots are ahead of the sequence; in a sound table none."""

    def raise_floor(self) -> None:
        """Make everything cached before now invalid. Ends a distrust, so only coherenced calls it."""

    def distrust(self) -> None:
        """Set the floor to TRUST_NOTHING: no stamp is good until coherenced raises the floor again."""

class Journal:
    """A backend's mapped journal: the slots it is about to change, for coherenced to bump if it dies."""

    @staticmethod
    def from_fd(fd: int) -> Journal:
        """Map the journal that coherenced handed out; fd is duplicated."""

    def move(self, fd: int) -> None:
        """Go on in another journal, taking along what is announced."""

    def close(self) -> None:
        """Unmap. Compiled code that still uses `vj` would touch unmapped memory."""

    def announce(self, slots: Sequence[int]) -> None:
        """Before the system call. More than JOURNAL_MAX slots mean: everything may have changed."""

    def clear(self) -> None:
        """After the bumps."""

    @property
    def backend_id(self) -> int:
        """The backend's number in the lease table."""

    @property
    def entries(self) -> tuple[int, ...]:
        """The slots announced now."""
