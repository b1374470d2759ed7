"""A domain without coherenced, whose guests are in this process: table, journals, leases, and what replies tell."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import Journal, Table, journal_content
from coherent_vfs.server.fuse.protocol import (
    ATTR,
    ATTR_OUT,
    GETATTR_IN,
    SETATTR_IN,
    WRITE_IN,
    Attr,
    EntryOut,
    FattrFlag,
    Opcode,
)
from tests.unit.server.raw_guest import Pending, RawGuest, raw_guest
from tests.unit.server.share import entry

MS = 1_000_000
"""Nanoseconds."""
LEASE_MAX, LEASE_MARGIN = 0.8, 0.02
"""Seconds, of guests that are not told otherwise. Longer than a busy machine lets a test wait in its middle."""
LONGEST = 780 * MS
"""Nanoseconds for which such a guest may keep what is old enough."""


@dataclass
class Alone:
    """What a device uses of coherence.client.dax.DaxClient, where nobody has a window."""

    coordinates: bool = False
    has_news: bool = False


@dataclass
class Membership:
    """What a device uses of coherence.client.membership.Membership."""

    table: Table
    journal: Journal
    leases: Leases
    dax: Alone = field(default_factory=Alone)


@dataclass
class Watcher:
    """What a file system uses of coherence.client.membership.Membership for the host watch.

    Args:
        watch: is asked for an inode, by descriptor and node id; whether an answer will come.
        ended: how often the guest's session has ended.
    """

    watch: Callable[[int, int], bool]
    ended: int = 0

    def unwatch(self) -> None:
        """A session has ended."""
        self.ended += 1


@dataclass
class LeaseDomain:
    """A domain with any number of guests on one directory."""

    share: Path
    table: Table
    leases: Leases
    holders: int = field(default=0)

    @contextmanager
    def guest(self, **settings: object) -> Iterator[RawGuest]:
        """One more guest, a stock one in mode shared."""
        self.holders += 1
        memory = os.memfd_create("journal")
        os.truncate(memory, 4096)
        os.pwrite(memory, journal_content(self.table.domain, self.holders), 0)
        journal = Journal.from_fd(memory)
        os.close(memory)
        settings = {"cache": "shared", "lease_max": LEASE_MAX, "lease_margin": LEASE_MARGIN, "xattr": True, **settings}
        with raw_guest(self.share, membership=Membership(self.table, journal, self.leases), **settings) as guest:  # type: ignore[arg-type]  # what the device uses
            yield guest


def lease_domain(share: Path) -> LeaseDomain:
    """A domain for a directory."""
    name = f"/vt-test-{os.getpid()}-{secrets.token_hex(4)}"
    table = Table.create(name, 1 << 20)
    Path(f"/dev/shm{name}").unlink()
    leases = Leases.create(f"{name}.leases", table)
    Path(f"/dev/shm{name}.leases").unlink()
    root = share.stat()
    table.add_root(table.inode_slot(root.st_dev, root.st_ino))
    return LeaseDomain(share, table, leases)


# --- requests ------------------------------------------------------------------------------------


def look_up(guest: RawGuest, parent: int, name: str) -> tuple[EntryOut, Attr]:
    """LOOKUP, of what is there or is said to be nothing for a time."""
    error, reply = guest.request(Opcode.LOOKUP, parent, name.encode() + b"\0")
    assert error == 0
    return entry(reply)


def find(guest: RawGuest, path: str) -> int:
    """The node id of a path."""
    nodeid = 1
    for part in Path(path).parts:
        nodeid = look_up(guest, nodeid, part)[0].nodeid
    return nodeid


def get_attributes(guest: RawGuest, nodeid: int) -> tuple[int, Attr]:
    """GETATTR: nanoseconds that the attributes are valid, and they."""
    error, reply = guest.request(Opcode.GETATTR, nodeid, GETATTR_IN.pack(0, 0))
    assert error == 0
    seconds, nanoseconds = ATTR_OUT.unpack_from(reply)
    return seconds * 1_000_000_000 + nanoseconds, Attr._make(ATTR.unpack_from(reply, ATTR_OUT.size))


def set_attributes(valid: FattrFlag, **values: int) -> bytes:
    """The body of a SETATTR; values: fh, size, mtime (seconds), mtimensec, mode."""
    return SETATTR_IN.pack(
        valid,
        values.get("fh", 0),
        values.get("size", 0),
        0,
        0,
        values.get("mtime", 0),
        0,
        0,
        values.get("mtimensec", 0),
        0,
        values.get("mode", 0),
        0,
        0,
    )


def write_body(data: bytes, offset: int = 0, *, fh: int = 0, flags: int = os.O_WRONLY, write_flags: int = 0) -> bytes:
    """The body of a WRITE; flags: of open(2)."""
    return WRITE_IN.pack(fh, offset, len(data), write_flags, 0, flags) + data


def entry_valid(out: EntryOut) -> int:
    """Nanoseconds that a name is valid."""
    return out.entry_valid * 1_000_000_000 + out.entry_valid_nsec


def attr_valid(out: EntryOut) -> int:
    """Nanoseconds that attributes are valid."""
    return out.attr_valid * 1_000_000_000 + out.attr_valid_nsec


def mtime_ns(attr: Attr) -> int:
    """The modification time, nanoseconds."""
    return attr.mtime * 1_000_000_000 + attr.mtimensec


def parked(guest: RawGuest, pending: Pending) -> bool:
    """Whether a request waits for leases of others."""
    return not pending.done and guest.device.parked > 0


def change(guest: RawGuest, opcode: Opcode, nodeid: int, body: bytes) -> bytes:
    """The reply to a request that may have to wait for leases, and succeeds."""
    pending = guest.post(opcode, nodeid, body)
    guest.wait(lambda: pending.done)
    error, reply = pending.outcome
    assert error == 0, error
    return reply
