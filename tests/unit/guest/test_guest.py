"""What a guest keeps, asks for and forgets, against a server in memory."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherent_vfs.coherence.shm.table import Table
from coherent_vfs.guest.fuse_client import FuseClient
from coherent_vfs.guest.guest import Guest
from coherent_vfs.server.fuse import protocol as p
from coherent_vfs.server.fuse.protocol import InitFlag, Opcode, OpenFlag
from tests.unit.guest.fuse_server import FuseServer


@pytest.fixture
def server() -> FuseServer:
    """A server with a directory d, a file d/f and a link l to it."""
    server = FuseServer()
    server.negative = True
    directory = server.add("d", mode=stat.S_IFDIR | 0o755)
    server.add("f", b"content", parent=directory)
    server.add("l", b"d/f", mode=stat.S_IFLNK | 0o777)
    return server


@pytest.fixture
def table_name() -> Iterator[str]:
    """The name of a version table."""
    name = f"/test-guest.{os.getpid()}.{secrets.token_hex(4)}"
    # So many that no two of the few that are used here are the same by chance.
    made = Table.create(name, 1 << 20)
    # A new table is trusted only when coherenced says so.
    made.raise_floor()
    made.close()
    yield name
    Path(f"/dev/shm{name}").unlink()


@pytest.fixture
def table(table_name: str) -> Iterator[Table]:
    """The table, for changes."""
    opened = Table.open(table_name, writable=True)
    yield opened
    opened.close()


@pytest.fixture(params=["time", "table"])
def guest(request: pytest.FixtureRequest, server: FuseServer) -> Iterator[Guest]:
    """A guest on the server, by each rule."""
    checks = request.param == "table"
    with Guest(server, Table.open(request.getfixturevalue("table_name")) if checks else None) as connected:
        assert connected.aware == checks
        yield connected


@pytest.fixture
def aware(server: FuseServer, table_name: str) -> Iterator[Guest]:
    """A guest that checks the table."""
    with Guest(server, Table.open(table_name)) as connected:
        yield connected


@pytest.fixture
def timed(server: FuseServer) -> Iterator[Guest]:
    """A guest that goes by time."""
    with Guest(server) as connected:
        yield connected


def sent(guest: Guest, act: Callable[[], object]) -> list[str]:
    """The operations that something takes, sorted."""
    before = guest.requests.copy()
    act()
    return sorted(opcode.name for opcode in (guest.requests - before).elements())


@pytest.mark.parametrize("target", ["/", ".", "/.", "../..", "d/.."])
def test_a_link_to_the_root(guest: Guest, server: FuseServer, target: str) -> None:
    server.add("here", target.encode(), mode=stat.S_IFLNK | 0o777)
    assert guest.stat("/here").st_ino == p.ROOT_ID
    assert guest.stat("/here/d/f").st_size == 7
    assert stat.S_ISLNK(guest.lstat("/here").st_mode)
    guest.drop_caches()
    assert guest.stat("/d/../here/").st_ino == p.ROOT_ID


# --- keeping -------------------------------------------------------------------------------------


def test_what_is_kept_takes_no_request(guest: Guest) -> None:
    def look() -> None:
        assert guest.stat("/d/f").st_size == 7
        assert not guest.exists("/d/none")
        assert guest.stat("/").st_mode == stat.S_IFDIR | 0o755

    assert sent(guest, look) == ["GETATTR", "LOOKUP", "LOOKUP", "LOOKUP"]
    assert sent(guest, look) == []
    guest.drop_caches()
    assert sent(guest, look) == ["GETATTR", "LOOKUP", "LOOKUP", "LOOKUP"]


def test_what_the_server_does_not_let_be_kept_is_asked_for_each_time(guest: Guest, server: FuseServer) -> None:
    server.ttl = 0
    server.negative = False
    for _ in range(2):
        requests = sent(guest, lambda: guest.stat("/d/f"))
        assert [name for name in requests if "FORGET" not in name] == ["LOOKUP", "LOOKUP"]
        assert sent(guest, lambda: guest.stat("/"))[-1] == "GETATTR"
        assert "LOOKUP" in sent(guest, lambda: guest.exists("/none"))


def test_a_missing_name_without_a_time_is_asked_for_each_time(guest: Guest, server: FuseServer) -> None:
    server.negative = False
    for _ in range(2):
        assert sent(guest, lambda: guest.exists("/none")) == ["LOOKUP"]


def test_scandir_brings_names_and_attributes(guest: Guest) -> None:
    requests = ["LOOKUP", "OPENDIR", "READDIRPLUS", "READDIRPLUS", "RELEASEDIR"]
    assert sent(guest, lambda: guest.scandir("/d")) == requests
    assert sent(guest, lambda: guest.stat("/d/f")) == []


def test_a_guest_without_the_flag_reads_names_only(server: FuseServer) -> None:
    server.init_flags = InitFlag(0)
    with Guest(server) as guest:
        assert [entry.name for entry in guest.scandir("/d")] == ["f"]
        assert guest.requests[Opcode.READDIRPLUS] == 0


def test_names_are_bounded_and_evicted_ones_are_forgotten(server: FuseServer) -> None:
    for number in range(50):
        server.add(f"n{number}")
    with Guest(server, max_names=10) as guest:
        for number in range(50):
            guest.stat(f"/n{number}")
            # What is used all the time stays.
            assert guest.stat("/d").st_mode
        assert guest.requests[Opcode.LOOKUP] == 51
        guest.client.send_forgets()
        assert sum(inode.lookups for inode in server.inodes.values()) == 10


def test_everything_is_forgotten_exactly_once(guest: Guest, server: FuseServer) -> None:
    for _ in range(3):
        guest.scandir("/d")
        guest.stat("/l")
        guest.tree.cache.root.listing = None
        guest.scandir("/")
    with guest.open("/d/f") as file:
        guest.drop_caches()
        held = {nodeid: inode.lookups for nodeid, inode in server.inodes.items() if inode.lookups}
        assert list(held) == [file.node.nodeid]
    del file
    guest.drop_caches()
    assert not any(inode.lookups for inode in server.inodes.values())
    assert guest.requests[Opcode.BATCH_FORGET] + guest.requests[Opcode.FORGET] > 0


class LateList(list[tuple[int, int]]):
    """A list to which another thread appends while it is being read."""

    late: tuple[int, int] | None = None

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if self.late is not None:
            late, self.late = self.late, None
            self.append(late)
        return part


def test_what_goes_while_the_last_is_being_forgotten_is_forgotten_next(server: FuseServer) -> None:
    client = FuseClient(server)
    first, second = (client.lookup(p.ROOT_ID, name).nodeid for name in (b"d", b"l"))
    client.forgotten = late = LateList([(first, 1)])
    late.late = (second, 1)
    client.send_forgets()
    assert (server.inodes[first].lookups, server.inodes[second].lookups) == (0, 1)
    client.send_forgets()
    assert server.inodes[second].lookups == 0


# --- by the table --------------------------------------------------------------------------------


def slot(table: Table, nodeid: int) -> int:
    """An inode's slot, as the guest finds it."""
    return nodeid % table.slot_count


def test_a_bump_invalidates_what_depends_on_the_slot(aware: Guest, server: FuseServer, table: Table) -> None:
    directory = server.inodes[1].children[b"d"]
    file = server.inodes[directory].children[b"f"]
    opened = aware.open("/d/f")

    def look() -> None:
        aware.stat("/d/f")
        aware.exists("/d/none")
        aware.listdir("/d")
        aware.readlink("/l")
        opened.pread(100, 0)

    look()
    assert sent(aware, look) == []
    for slots, requests in (
        ([slot(table, file)], ["GETATTR", "READ"]),
        ([table.name_slot(slot(table, directory), b"f")], ["LOOKUP"]),
        ([table.name_slot(slot(table, directory), b"none")], ["LOOKUP"]),
        ([slot(table, directory)], ["OPENDIR", "READDIR", "READDIR", "RELEASEDIR"]),
        ([table.name_slot(1, b"d")], ["LOOKUP"]),
        ([slot(table, server.inodes[1].children[b"l"])], ["READLINK"]),
    ):
        for each in slots:
            table.bump(each)
        assert sent(aware, look) == requests
        assert sent(aware, look) == []
    opened.close()


def test_the_floor_invalidates_everything(aware: Guest, table: Table) -> None:
    aware.stat("/d/f")
    table.raise_floor()
    assert sent(aware, lambda: aware.stat("/d/f")) == ["LOOKUP", "LOOKUP"]
    assert sent(aware, lambda: aware.stat("/d/f")) == []
    table.distrust()
    for _ in range(2):
        assert "LOOKUP" in sent(aware, lambda: aware.stat("/d/f"))
    table.raise_floor()
    aware.stat("/d/f")
    assert sent(aware, lambda: aware.stat("/d/f")) == []


def test_a_change_between_reply_and_use_is_not_missed(aware: Guest, server: FuseServer, table: Table) -> None:
    inodes = {slot(table, nodeid): inode for nodeid, inode in server.inodes.items()}
    names = [table.name_slot(parent, name) for parent, inode in inodes.items() for name in inode.children]

    def change(opcode: Opcode, reply: bytes) -> bytes:
        if opcode in (Opcode.LOOKUP, Opcode.READ, Opcode.READDIR, Opcode.GETATTR):
            for each in (*inodes, *names):
                table.bump(each)
        return reply

    server.spoil = change
    with aware.open("/d/f") as file:
        for _ in range(2):
            assert sent(aware, lambda: aware.stat("/d/f")).count("LOOKUP") == 2
            assert "READDIR" in sent(aware, lambda: aware.listdir("/d"))
            assert sent(aware, lambda: file.pread(10, 0)) == ["READ"]


def test_time_plays_no_part_for_who_checks(aware: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    aware.stat("/d/f")
    later = time.monotonic() + 1e6
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert sent(aware, lambda: aware.stat("/d/f")) == []


# --- by time -------------------------------------------------------------------------------------


def test_time_expires_names_and_attributes(timed: Guest, server: FuseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    timed.stat("/d/f")
    server.inodes[server.inodes[server.inodes[1].children[b"d"]].children[b"f"]].data = b"longer content"
    assert timed.stat("/d/f").st_size == 7
    later = time.monotonic() + server.ttl + 1
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert timed.stat("/d/f").st_size == 14


def test_own_changes_are_seen_at_once(timed: Guest) -> None:
    timed.stat("/d/f")
    assert not timed.exists("/new")
    timed.mkdir("/new")
    assert timed.exists("/new")
    assert "new" in timed.listdir("/")
    timed.unlink("/d/f")
    assert not timed.exists("/d/f")


def test_close_to_open(timed: Guest, server: FuseServer) -> None:
    server.open_flags = OpenFlag(0)
    inode = server.inodes[server.inodes[server.inodes[1].children[b"d"]].children[b"f"]]
    with timed.open("/d/f") as file:
        assert file.pread(7, 0) == b"content"
        inode.data = b"CONTENT"
        assert file.pread(7, 0) == b"content"
        with timed.open("/d/f") as again:
            assert again.pread(7, 0) == file.pread(7, 0) == b"CONTENT"


@pytest.mark.parametrize("auto_inval", [True, False])
def test_pages_go_when_size_or_time_turns_out_different(server: FuseServer, auto_inval: bool) -> None:
    server.init_flags = InitFlag.AUTO_INVAL_DATA if auto_inval else InitFlag(0)
    inode = server.inodes[server.inodes[server.inodes[1].children[b"d"]].children[b"f"]]
    with Guest(server) as guest, guest.open("/d/f") as file:
        assert file.pread(7, 0) == b"content"
        server.ttl = 0
        guest.drop_caches()
        guest.stat("/d/f")
        assert file.pread(7, 0) == b"content"
        inode.data, inode.mtime = b"CONTENT", 2
        guest.stat("/d/f")
        assert file.pread(7, 0) == (b"CONTENT" if auto_inval else b"content")
        inode.data = b"longer content"
        guest.stat("/d/f")
        assert file.pread(7, 0) == b"longer "


def test_a_file_that_grows_is_read_further(timed: Guest, server: FuseServer) -> None:
    server.ttl = 0
    server.init_flags = InitFlag(0)
    inode = server.inodes[server.inodes[server.inodes[1].children[b"d"]].children[b"f"]]
    with timed.open("/d/f") as file:
        assert file.pread(100, 0) == b"content"
        inode.data += b" and more"
        assert file.pread(100, 0) == b"content and more"


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (OpenFlag(0), ["OPENDIR", "READDIR", "READDIR", "RELEASEDIR"]),
        (OpenFlag.CACHE_DIR, ["OPENDIR", "READDIR", "READDIR", "RELEASEDIR"]),
        (OpenFlag.CACHE_DIR | OpenFlag.KEEP_CACHE, ["OPENDIR", "RELEASEDIR"]),
    ],
)
def test_listings_are_kept_as_the_server_says(
    timed: Guest, server: FuseServer, flags: OpenFlag, again: list[str]
) -> None:
    server.opendir_flags = flags
    timed.listdir("/d")
    assert sent(timed, lambda: timed.listdir("/d")) == again
    server.inodes[server.inodes[1].children[b"d"]].mtime += 1
    server.add("g", parent=server.inodes[1].children[b"d"])
    timed.tree.cache.rule.changed(timed.tree.find("/d")[0].slot)
    assert sorted(timed.listdir("/d")) == ["f", "g"]


# --- pages ---------------------------------------------------------------------------------------


def test_pages_are_kept_whole_and_to_the_end(guest: Guest, server: FuseServer) -> None:
    data = os.urandom(300_000)
    server.add("big", data)
    with guest.open("/big") as file:
        assert file.pread(5000, 4095) == data[4095:9095]
        assert sent(guest, lambda: file.pread(3 * 4096, 0)) == []
        assert sent(guest, lambda: file.read(10)) == []
        assert file.pread(1 << 20, 0) == data
        assert sent(guest, lambda: file.pread(1 << 20, 299_999)) == []
        assert file.pread(10, 1 << 30) == b""
        assert sent(guest, lambda: file.pread(10, 1 << 30)) == []


def test_reading_on_reads_ahead(guest: Guest, server: FuseServer) -> None:
    server.add("big", bytes(1 << 20))
    with guest.open("/big") as file:
        assert len(sent(guest, lambda: [file.read(4096) for _ in range(256)])) <= 10


def test_pages_are_bounded(server: FuseServer) -> None:
    server.add("big", bytes(100 * 4096))
    with Guest(server, max_pages=20) as guest, guest.open("/big") as file:
        file.pread(100 * 4096, 0)
        assert sent(guest, lambda: file.pread(10, 99 * 4096)) == []
        assert sent(guest, lambda: file.pread(10, 0)) == ["READ"]


def test_direct_files_keep_nothing(guest: Guest, server: FuseServer) -> None:
    server.open_flags = OpenFlag.DIRECT_IO
    server.add("big", b"x" * 3_000_000)
    with guest.open("/big") as file:
        for _ in range(2):
            assert sent(guest, lambda: file.pread(3_000_000, 0)) == ["READ", "READ", "READ"]


# --- a server that answers nonsense --------------------------------------------------------------


def header(length: int, error: int, unique: int) -> bytes:
    """A reply header."""
    return p.OUT_HEADER.pack(length, error, unique)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: b"",
        lambda reply: reply[:15],
        lambda reply: reply[:-1],
        lambda reply: header(17, 0, struct.unpack_from("<Q", reply, 8)[0]) + b"x",
        lambda reply: header(len(reply), 5, struct.unpack_from("<Q", reply, 8)[0]) + reply[16:],
        lambda reply: header(len(reply), -5000, struct.unpack_from("<Q", reply, 8)[0]) + reply[16:],
        lambda reply: header(len(reply), 0, 999) + reply[16:],
    ],
)
def test_a_reply_that_is_none_is_an_error(guest: Guest, server: FuseServer, spoil: Callable[[bytes], bytes]) -> None:
    server.spoil = lambda opcode, reply: spoil(reply) if opcode != Opcode.DESTROY else reply
    for path in ("/", "/d"):
        with pytest.raises(OSError, match="reply") as raised:
            guest.stat(path)
        assert raised.value.errno == errno.EIO


def test_a_server_of_another_protocol_is_refused(server: FuseServer) -> None:
    def spoil(_: Opcode, reply: bytes) -> bytes:
        return reply[:16] + struct.pack("<I", 8) + reply[20:]

    server.spoil = spoil
    with pytest.raises(OSError, match=r"speaks FUSE 8\."):
        Guest(server)


def test_broken_directory_entries_are_an_error(guest: Guest, server: FuseServer) -> None:
    def spoil(opcode: Opcode, reply: bytes) -> bytes:
        if opcode == Opcode.READDIR and len(reply) > 16:
            return reply[:32] + struct.pack("<I", 60_000) + reply[36:]
        return reply

    server.spoil = spoil
    with pytest.raises(OSError, match="directory entry"):
        guest.listdir("/d")


def test_a_write_that_claims_too_much_or_nothing_is_an_error(guest: Guest, server: FuseServer) -> None:
    for written in (0, 100):

        def spoil(opcode: Opcode, reply: bytes, written: int = written) -> bytes:
            return reply[:16] + p.WRITE_OUT.pack(written) if opcode == Opcode.WRITE else reply

        server.spoil = spoil
        with guest.open("/d/f", os.O_WRONLY) as file, pytest.raises(OSError, match=r"written|wrote nothing"):
            file.write(b"data")


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [31, 36, 45])
def test_the_older_version_counts(server: FuseServer, minor: int) -> None:
    server.minor = 38
    with Guest(server, minor=minor) as guest:
        assert guest.client.minor == min(38, minor)
    assert server.destroyed


def test_a_server_that_refuses_the_proof_is_believed_by_time(
    server: FuseServer, table_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(server, "_setxattr", refuse)
    with Guest(server, Table.open(table_name)) as guest:
        assert not guest.aware
        assert guest.stat("/d/f").st_size == 7


def test_a_file_left_open_is_warned_about(guest: Guest) -> None:
    file = guest.open("/d/f")
    with pytest.warns(ResourceWarning, match="d/f was not closed"):
        del file
