"""What each operation bumps in the version table, and when (docs: design, "What depends on what")."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import JOURNAL_BYTES, Journal, Table, journal_content, parse_journal
from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    ENTRY_OUT,
    FALLOCATE_IN,
    LINK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RENAME2_IN,
    SETATTR_IN,
    SETXATTR_IN_SHORT,
    WRITE_IN,
    FattrFlag,
    Opcode,
)
from tests.unit.server.leased import Membership
from tests.unit.server.raw_guest import RawGuest, raw_guest

SLOTS = 1 << 20


@dataclass
class Domain:
    """A membership without a coherenced: the table, the journal, and a guest whose changes go there."""

    table: Table
    leases: Leases
    journal: Journal
    journal_fd: int
    share: Path
    guest: RawGuest

    def inode(self, path: str) -> int:
        status = (self.share / path).lstat()
        return self.table.inode_slot(status.st_dev, status.st_ino)

    def name(self, directory: str, name: str) -> int:
        return self.table.name_slot(self.inode(directory), name.encode())

    def nodeid(self, path: str) -> int:
        nodeid = 1
        for part in Path(path).parts:
            error, reply = self.guest.request(Opcode.LOOKUP, nodeid, part.encode() + b"\0")
            assert error == 0
            nodeid = ENTRY_OUT.unpack_from(reply)[0]
        return nodeid

    def bumped(self, change: Callable[[], tuple[int, bytes]], candidates: dict[str, int]) -> set[str]:
        """Which of the candidate slots the change bumped."""
        before = self.table.sequence
        error, _ = change()
        assert error == 0
        assert self.journal.entries == ()
        return {what for what, slot in candidates.items() if self.table.slot(slot) > before}


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[Domain]:
    share = tmp_path / "share"
    (share / "d").mkdir(parents=True)
    (share / "e").mkdir()
    for name in ("d/f", "d/g", "e/h"):
        (share / name).write_bytes(b"content")
    name = f"/vt-test-{os.getpid()}-{secrets.token_hex(4)}"
    table = Table.create(name, SLOTS)
    Path(f"/dev/shm{name}").unlink()
    memory = os.memfd_create("journal")
    os.truncate(memory, 4096)
    os.pwrite(memory, journal_content(table.domain, 1), 0)
    journal = Journal.from_fd(memory)
    root = share.stat()
    table.add_root(table.inode_slot(root.st_dev, root.st_ino))
    leases = Leases.create(f"{name}.leases", table)
    Path(f"/dev/shm{name}.leases").unlink()

    with raw_guest(share, cache="shared", xattr=True, membership=Membership(table, journal, leases)) as guest:  # type: ignore[arg-type]  # what the device uses
        yield Domain(table, leases, journal, memory, share, guest)
    os.close(memory)


def test_changes_are_marked_while_the_host_watch_wants_it(domain: Domain) -> None:
    nodeid = domain.nodeid("d/f")

    fh, _, _ = OPEN_OUT.unpack(domain.guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_WRONLY, 0))[1])

    def write() -> int:
        assert domain.guest.request(Opcode.WRITE, nodeid, WRITE_IN.pack(fh, 0, 1, 0, 0, os.O_WRONLY) + b"x")[0] == 0
        return parse_journal(os.pread(domain.journal_fd, JOURNAL_BYTES, 0)).changes

    unmarked = write()
    assert write() == unmarked
    domain.leases.want_markers(True)
    first = write()
    assert first > unmarked
    assert write() == first + 1
    domain.leases.want_markers(False)
    assert write() == first + 1


def everything(domain: Domain) -> dict[str, int]:
    """The slots around the tree of the fixture."""
    return {
        "d": domain.inode("d"),
        "e": domain.inode("e"),
        "f": domain.inode("d/f"),
        "g": domain.inode("d/g"),
        "h": domain.inode("e/h"),
        "d/f": domain.name("d", "f"),
        "d/g": domain.name("d", "g"),
        "d/new": domain.name("d", "new"),
        "e/h": domain.name("e", "h"),
        "e/new": domain.name("e", "new"),
        "root": 1,
    }


def test_a_node_id_carries_its_slot(domain: Domain) -> None:
    nodeid = domain.nodeid("d/f")
    assert nodeid & (SLOTS - 1) == domain.inode("d/f")


@pytest.mark.parametrize(
    ("opcode", "path", "body", "expected"),
    [
        (Opcode.CREATE, "d", CREATE_IN.pack(os.O_RDWR, stat.S_IFREG, 0, 0) + b"new\0", {"d", "d/new"}),
        (Opcode.CREATE, "d", CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, 0, 0, 0) + b"f\0", {"f"}),
        (Opcode.MKDIR, "d", MKDIR_IN.pack(0o755, 0) + b"new\0", {"d", "d/new"}),
        (Opcode.MKNOD, "d", MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0) + b"new\0", {"d", "d/new"}),
        (Opcode.SYMLINK, "d", b"new\0target\0", {"d", "d/new"}),
        (Opcode.UNLINK, "d", b"f\0", {"d", "d/f", "f"}),
        (Opcode.LOOKUP, "d", b"f\0", set()),
        (Opcode.GETATTR, "d/f", bytes(16), set()),
        (Opcode.OPEN, "d/f", OPEN_IN.pack(os.O_RDWR, 0), set()),
        (Opcode.OPEN, "d/f", OPEN_IN.pack(os.O_RDWR | os.O_TRUNC, 0), {"f"}),
        (
            Opcode.SETATTR,
            "d/f",
            SETATTR_IN.pack(FattrFlag.MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0),
            {"f"},
        ),
        (Opcode.SETXATTR, "d/f", SETXATTR_IN_SHORT.pack(1, 0) + b"user.a\0x", {"f"}),
    ],
)
def test_one_request(domain: Domain, opcode: Opcode, path: str, body: bytes, expected: set[str]) -> None:
    nodeid, candidates = domain.nodeid(path), everything(domain)
    assert domain.bumped(lambda: domain.guest.request(opcode, nodeid, body), candidates) == expected


def test_write_and_fallocate_but_not_read(domain: Domain) -> None:
    nodeid, candidates = domain.nodeid("d/f"), everything(domain)
    _, reply = domain.guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDWR, 0))
    fh, _, _ = OPEN_OUT.unpack(reply)
    request = domain.guest.request
    assert domain.bumped(lambda: request(Opcode.READ, nodeid, READ_IN.pack(fh, 0, 9, 0, 0, 0)), candidates) == set()
    assert domain.bumped(
        lambda: request(Opcode.WRITE, nodeid, WRITE_IN.pack(fh, 0, 1, 0, 0, 0) + b"x"), candidates
    ) == {"f"}
    assert domain.bumped(lambda: request(Opcode.FALLOCATE, nodeid, FALLOCATE_IN.pack(fh, 0, 9, 0)), candidates) == {"f"}


@pytest.mark.parametrize(
    ("flags", "names", "expected"),
    [
        (0, (b"f", b"h"), {"d", "e", "d/f", "e/h", "f", "h"}),
        (0, (b"f", b"new"), {"d", "e", "d/f", "e/new", "f"}),
        (2, (b"f", b"h"), {"d", "e", "d/f", "e/h", "f", "h"}),
    ],
)
def test_rename_and_exchange(domain: Domain, flags: int, names: tuple[bytes, bytes], expected: set[str]) -> None:
    old, new, candidates = domain.nodeid("d"), domain.nodeid("e"), everything(domain)
    body = RENAME2_IN.pack(new, flags) + b"\0".join(names) + b"\0"
    assert domain.bumped(lambda: domain.guest.request(Opcode.RENAME2, old, body), candidates) == expected


def test_link(domain: Domain) -> None:
    inode, parent, candidates = domain.nodeid("d/f"), domain.nodeid("e"), everything(domain)
    body = LINK_IN.pack(inode) + b"new\0"
    assert domain.bumped(lambda: domain.guest.request(Opcode.LINK, parent, body), candidates) == {
        "e",
        "e/new",
        "f",
    }


def test_rmdir(domain: Domain) -> None:
    (domain.share / "d/empty").mkdir()
    candidates = everything(domain) | {"empty": domain.inode("d/empty"), "d/empty": domain.name("d", "empty")}
    parent = domain.nodeid("d")
    assert domain.bumped(lambda: domain.guest.request(Opcode.RMDIR, parent, b"empty\0"), candidates) == {
        "d",
        "empty",
        "d/empty",
    }


def test_the_root_is_slot_1_as_well(domain: Domain) -> None:
    """A guest finds the root's things under node id 1, a guest of an outer share under the inode's slot."""
    candidates = {
        "root": 1,
        "root inode": domain.inode("."),
        "name": domain.name(".", "new"),
        "name under 1": domain.table.name_slot(1, b"new"),
    }
    body = MKDIR_IN.pack(0o755, 0) + b"new\0"
    assert domain.bumped(lambda: domain.guest.request(Opcode.MKDIR, 1, body), candidates) == set(candidates)


def test_a_change_that_fails_leaves_no_announcement(domain: Domain) -> None:
    error, _ = domain.guest.request(Opcode.MKDIR, domain.nodeid("d"), MKDIR_IN.pack(0o755, 0) + b"f\0")
    assert error
    assert domain.journal.entries == ()
    before = domain.table.sequence
    taken = CREATE_IN.pack(os.O_RDWR | os.O_EXCL, stat.S_IFREG, 0, 0) + b"f\0"
    assert domain.guest.request(Opcode.CREATE, domain.nodeid("d"), taken)[0]
    assert domain.guest.request(Opcode.UNLINK, domain.nodeid("d"), b"missing\0")[0]
    assert domain.journal.entries == ()
    # Who tries for a lock file again and again disturbs nobody.
    assert domain.table.sequence == before


def test_the_announcement_is_there_during_the_system_call(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[tuple[int, ...]] = []
    mkdir = os.mkdir

    def watched(*args: object, **options: object) -> None:
        during.append(domain.journal.entries)
        mkdir(*args, **options)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(os, "mkdir", watched)
    parent = domain.nodeid("d")
    assert domain.guest.request(Opcode.MKDIR, parent, MKDIR_IN.pack(0o755, 0) + b"new\0")[0] == 0
    assert set(during[0]) == {domain.name("d", "new"), domain.inode("d")}


def test_a_name_that_another_backend_changed_meanwhile(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then which inode was behind it: everything is given up."""
    parent, mkdir = domain.nodeid("d"), os.mkdir

    def overtaken(*args: object, **options: object) -> None:
        domain.table.bump(domain.name("d", "new"))
        mkdir(*args, **options)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(os, "mkdir", overtaken)
    floor = domain.table.floor
    assert domain.guest.request(Opcode.MKDIR, parent, MKDIR_IN.pack(0o755, 0) + b"new\0")[0] == 0
    assert domain.table.floor > floor


def test_a_directory_that_becomes_the_root_of_a_share_meanwhile(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new share's guest finds things under slot 1, of which nobody knew when the change began."""
    parent, mkdir = domain.nodeid("d"), os.mkdir
    stamps: list[int] = []

    def joined(*args: object, **options: object) -> None:
        domain.table.add_root(domain.inode("d"))
        stamps.append(domain.table.stamp())
        mkdir(*args, **options)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(os, "mkdir", joined)
    assert domain.guest.request(Opcode.MKDIR, parent, MKDIR_IN.pack(0o755, 0) + b"new\0")[0] == 0
    assert not domain.table.valid(domain.table.name_slot(1, b"new"), stamps[0])
    assert not domain.table.valid(1, stamps[0])


def test_names_are_bumped_before_inodes(domain: Domain) -> None:
    parent = domain.nodeid("d")
    name, inodes = domain.name("d", "f"), (domain.inode("d"), domain.inode("d/f"))
    assert domain.guest.request(Opcode.UNLINK, parent, b"f\0")[0] == 0
    assert all(domain.table.slot(name) < domain.table.slot(inode) for inode in inodes)


def test_only_a_guest_that_checks_the_table_gets_long_timeouts(domain: Domain) -> None:
    def valid() -> int:
        return int(ENTRY_OUT.unpack_from(domain.guest.request(Opcode.LOOKUP, 1, b"d\0")[1])[2])

    def prove(value: bytes) -> int:
        body = SETXATTR_IN_SHORT.pack(len(value), 0) + b"trusted.coherence.domain\0" + value
        return domain.guest.request(Opcode.SETXATTR, 1, body)[0]

    assert valid() == 0
    assert prove(bytes(16)) != 0
    assert valid() == 0
    assert prove(domain.table.domain) == 0
    assert valid() == 86400
    # To it, a name that is not there is an answer as good as any.
    error, reply = domain.guest.request(Opcode.LOOKUP, 1, b"missing\0")
    assert (error, ENTRY_OUT.unpack_from(reply)[:3]) == (0, (0, 0, 86400))
    domain.guest.initialize()
    assert valid() == 0
