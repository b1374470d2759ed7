"""Files read and written through a guest's window, against a server in memory that maps them there."""

from __future__ import annotations

import errno
import gc
import os
import random
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.guest import window as window_module
from coherent_vfs.guest.guest import Guest
from coherent_vfs.guest.window import Window
from coherent_vfs.server.fuse import protocol as p
from coherent_vfs.server.fuse.protocol import AttrFlag, InitFlag, Opcode, SetupMappingFlag
from tests.unit.guest.fuse_server import FuseServer

READ = SetupMappingFlag.READ
WRITE = SetupMappingFlag.WRITE
DAX = InitFlag.MAP_ALIGNMENT | InitFlag.HAS_INODE_DAX


class DaxServer(FuseServer):
    """A server whose files are memfds, with a window for its one guest.

    Attributes:
        window: where it maps them.
        plain: node ids of files that it does not want to be mapped.
        refuse: errno of every SETUPMAPPING, 0 for none.
        lie: answer SETUPMAPPING without doing it.
        log: what it was asked about mappings, and to forget.
    """

    def __init__(self, chunks: int = 4) -> None:
        super().__init__()
        self.init_flags |= DAX | InitFlag.INIT_EXT
        self.offered = InitFlag(0)
        self.map_alignment = 12
        self.window = Window(chunks * CHUNK)
        self.fds: dict[int, int] = {}
        self.plain: set[int] = set()
        self.refuse = 0
        self.lie = False
        self.log: list[tuple[object, ...]] = []

    def add_file(self, name: str, data: bytes) -> int:
        """Make a file; its descriptor."""
        nodeid = self.add(name)
        fd = self.fds[nodeid] = os.memfd_create(name)
        os.write(fd, data)
        return fd

    def _init(self, _: int, body: bytes) -> bytes:
        init = p.InitIn._make(p.INIT_IN.unpack(body))
        self.offered = InitFlag(init.flags | init.flags2 << 32)
        agreed = self.init_flags & (self.offered | ~DAX)
        return p.INIT_OUT.pack(
            *(7, self.minor, 0, agreed & 0xFFFFFFFF, 0, 0, 1 << 20, 1, 256, self.map_alignment, agreed >> 32, 0, 0)
        )

    def _attr(self, nodeid: int) -> bytes:
        attr = p.Attr._make(p.ATTR.unpack(super()._attr(nodeid)))
        if nodeid in self.fds:
            flags = 0 if nodeid in self.plain else AttrFlag.DAX
            attr = attr._replace(size=os.fstat(self.fds[nodeid]).st_size, flags=flags)
        return p.ATTR.pack(*attr)

    def _read(self, nodeid: int, body: bytes) -> bytes:
        _, offset, size, *_ = p.READ_IN.unpack(body)
        return os.pread(self.fds[nodeid], size, offset)

    def _write(self, nodeid: int, body: bytes) -> bytes:
        _, offset, size, *_ = p.WRITE_IN.unpack_from(body)
        os.pwrite(self.fds[nodeid], body[p.WRITE_IN.size :], offset)
        return p.WRITE_OUT.pack(size)

    def _setattr(self, nodeid: int, body: bytes) -> bytes:
        os.ftruncate(self.fds[nodeid], p.SetattrIn._make(p.SETATTR_IN.unpack(body)).size)
        return self._getattr(nodeid, b"")

    def _setupmapping(self, nodeid: int, body: bytes) -> bytes:
        fh, offset, length, flags, moffset = p.SETUPMAPPING_IN.unpack(body)
        assert fh == (1 << 64) - 1
        self.log.append(("map", nodeid, offset // CHUNK, moffset // CHUNK, SetupMappingFlag(flags)))
        if self.refuse:
            raise OSError(self.refuse, "refused")
        if not self.lie:
            if self.window.is_mapped(moffset, length):
                self.window.unmap(moffset, length)
            self.window.map(self.fds[nodeid], offset, moffset, length, writable=bool(flags & WRITE))
        return b""

    def _removemapping(self, nodeid: int, body: bytes) -> bytes:
        (count,) = p.REMOVEMAPPING_IN.unpack_from(body)
        ranges = list(p.REMOVEMAPPING_ONE.iter_unpack(body[p.REMOVEMAPPING_IN.size :]))
        assert len(ranges) == count
        self.log.append(("unmap", nodeid, *sorted(moffset // CHUNK for moffset, _ in ranges)))
        for moffset, length in ranges:
            self.window.unmap(moffset, length)
        return b""

    def _forget(self, nodeid: int, lookups: int) -> None:
        self.log.append(("forget", nodeid))
        super()._forget(nodeid, lookups)


@pytest.fixture
def server() -> Iterator[DaxServer]:
    """A server with a window of four chunks."""
    server = DaxServer()
    yield server
    for fd in server.fds.values():
        os.close(fd)


@pytest.fixture
def guest(server: DaxServer) -> Iterator[Guest]:
    """A guest that maps what the server says."""
    with Guest(server, window=server.window, dax="inode") as guest:
        yield guest


def sent(guest: Guest, act: Callable[[], object]) -> Counter[str]:
    """The operations that something takes."""
    before = guest.requests.copy()
    act()
    return Counter({opcode.name: count for opcode, count in (guest.requests - before).items()})


# --- reading and writing -------------------------------------------------------------------------


def test_reads_and_writes_are_loads_and_stores(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"hello" * 1000)
    with guest.open("/f", os.O_RDWR) as file:
        assert sent(guest, lambda: file.pread(5, 5)) == {"SETUPMAPPING": 1}
        assert file.pread(100, 4998) == b"lo"
        assert (file.pread(5, 5000), file.pread(5, CHUNK)) == (b"", b"")
        assert sent(guest, lambda: file.pwrite(b"jello", 0)) == {"SETUPMAPPING": 1}
        assert (os.pread(fd, 10, 0), file.pread(10, 0)) == (b"jellohello",) * 2
        os.pwrite(fd, b"HOST", 2000)
        assert sent(guest, lambda: file.pwrite(b"!", 4999)) == {}
        assert (file.pread(4, 2000), file.read()[-2:]) == (b"HOST", b"l!")
    nodeid = file.node.nodeid
    assert server.log == [("map", nodeid, 0, 0, READ), ("map", nodeid, 0, 0, READ | WRITE)]
    assert guest.mapped == CHUNK


def test_a_write_that_extends_the_file_is_sent(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"hello")
    with guest.open("/f", os.O_RDWR | os.O_APPEND) as file:
        assert sent(guest, lambda: file.pwrite(b"abc", 3))["WRITE"] == 1
        assert sent(guest, lambda: file.write(b"def"))["WRITE"] == 1
        assert sent(guest, lambda: file.pwrite(b"", 100))["WRITE"] == 0
        assert file.pread(100, 0) == os.pread(fd, 100, 0) == b"helabcdef"
        file.truncate(4)
        assert file.pread(100, 0) == b"hela"


def test_across_chunks(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"")
    os.ftruncate(fd, 2 * CHUNK + 100)
    with guest.open("/f", os.O_RDWR) as file:
        assert file.pwrite(b"x" * (CHUNK + 20), CHUNK - 10) == CHUNK + 20
        assert file.pread(CHUNK + 40, CHUNK - 20) == bytes(10) + b"x" * (CHUNK + 20) + bytes(10)
    assert os.pread(fd, 12, CHUNK - 11) == b"\0" + b"x" * 11
    assert guest.mapped == 3 * CHUNK


def test_a_guest_without_a_table_learns_of_growth_as_linux_does(guest: Guest, server: DaxServer) -> None:
    server.ttl = 0
    fd = server.add_file("f", b"hello")
    with guest.open("/f") as file:
        assert file.read() == b"hello"
        os.write(fd, b"more")
        assert sent(guest, file.read) == {}
        assert file.stat().st_size == 9
        assert file.read() == b"more"


def test_a_file_that_is_not_to_be_mapped(guest: Guest, server: DaxServer) -> None:
    server.add_file("f", b"hello")
    server.plain.update(server.fds)
    with guest.open("/f", os.O_RDWR) as file:
        assert sent(guest, lambda: file.pread(5, 0))["READ"] == 1
        with pytest.raises(OSError, match="'/f'") as caught:
            file.mmap()
        assert caught.value.errno == errno.ENODEV


def test_the_servers_wish_changes(guest: Guest, server: DaxServer) -> None:
    """A file in use stays what it was; the next to open it afterwards sees the change (fuse_dax_dontcache)."""
    server.ttl = 0
    server.add_file("f", b"hello")
    server.plain.update(server.fds)
    with guest.open("/f") as first:
        first.pread(5, 0)
        server.plain.clear()
        first.stat()
        with guest.open("/f") as second:
            assert not second.node.dax
    server.ttl = 1000
    del first, second
    for _ in range(2):
        with guest.open("/f") as third:
            assert third.node.dax
            assert third.pread(5, 0) == b"hello"
    assert guest.requests[Opcode.READ] == 1


def test_names_of_a_file_that_changed_are_not_kept(guest: Guest, server: DaxServer) -> None:
    server.add_file("f", b"hello")
    assert guest.stat("/f").st_size == 5
    with guest.open("/f") as file:
        server.plain.update(server.fds)
        guest.tree.cache.drop()
        assert guest.stat("/f").st_size == 5
        assert file.node.outdated
        assert sent(guest, lambda: guest.stat("/f")) == {"LOOKUP": 1}
    del file
    assert sent(guest, lambda: guest.stat("/f"))["LOOKUP"] == 1
    assert sent(guest, lambda: guest.stat("/f")) == {}


# --- the window ----------------------------------------------------------------------------------


def fill(guest: Guest, server: DaxServer, count: int) -> list[int]:
    """Map a chunk of each of `count` files f0, f1, ...; their node ids."""
    nodeids = []
    for number in range(count):
        server.add_file(f"f{number}", b"hello %d" % number)
        assert guest.read_bytes(f"/f{number}") == b"hello %d" % number
        nodeids.append(max(server.fds))
    return nodeids


def test_what_was_used_longest_ago_goes(guest: Guest, server: DaxServer) -> None:
    nodeids = fill(guest, server, 4)
    assert guest.read_bytes("/f0") == b"hello 0"
    server.log.clear()
    (fifth,) = fill_one_more(guest, server, 4)
    assert server.log == [("unmap", nodeids[1], 1), ("map", fifth, 0, 1, READ)]
    assert guest.mapped == 4 * CHUNK
    assert [guest.read_bytes(f"/f{number}") for number in range(5)] == [b"hello %d" % number for number in range(5)]


def fill_one_more(guest: Guest, server: DaxServer, number: int) -> list[int]:
    """As fill(), for one file."""
    server.add_file(f"f{number}", b"hello %d" % number)
    assert guest.read_bytes(f"/f{number}") == b"hello %d" % number
    return [max(server.fds)]


def test_what_is_forgotten_is_unmapped_before(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"")
    os.ftruncate(fd, 3 * CHUNK)
    assert len(guest.read_bytes("/f")) == 3 * CHUNK
    server.log.clear()
    guest.drop_caches()
    (nodeid,) = server.fds
    assert server.log == [("unmap", nodeid, 0, 1, 2), ("forget", nodeid)]
    assert guest.mapped == 0


def test_the_end_unmaps(server: DaxServer) -> None:
    with Guest(server, window=server.window, dax="inode") as guest:
        fill(guest, server, 3)
    assert not any(server.window.is_mapped(moffset, CHUNK) for moffset in range(0, 4 * CHUNK, CHUNK))


def test_the_server_refuses(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"hello")
    with guest.open("/f", os.O_RDWR) as file:
        server.refuse = errno.ENOSPC
        for act in (lambda: file.pread(5, 0), lambda: file.pwrite(b"j", 0), file.mmap):
            with pytest.raises(OSError, match="'/f'") as caught:
                act()
            assert caught.value.errno == errno.ENOSPC
        server.refuse = 0
        assert file.pread(5, 0) == b"hello"
        server.refuse = errno.ENOSPC
        with pytest.raises(OSError):
            file.pwrite(b"j", 0)
        assert file.pread(5, 0) == os.pread(fd, 5, 0) == b"hello"
    assert {entry[3] for entry in server.log} == {0}


def test_the_server_maps_nothing(guest: Guest, server: DaxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "REPLACE_SECONDS", 0.1)
    server.add_file("f", b"hello")
    server.lie = True
    with guest.open("/f", os.O_RDWR) as file:
        for act in (lambda: file.pread(5, 0), lambda: file.pwrite(b"j", 0)):
            with pytest.raises(OSError, match="nothing is mapped") as caught:
                act()
            assert caught.value.errno == errno.EIO
        assert bytes(file.mmap()) == bytes(5)


def test_reads_and_writes_wait_while_a_mapping_is_replaced(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"hello")
    with guest.open("/f", os.O_RDWR) as file:
        file.pwrite(b"j", 0)
        moffset = server.log[0][3]
        assert moffset == 0
        server.window.unmap(0, CHUNK)
        got: list[object] = []
        threads = [
            threading.Thread(target=lambda: got.append(file.pread(5, 0))),
            threading.Thread(target=lambda: got.append(file.pwrite(b"!", 4))),
        ]
        for thread in threads:
            thread.start()
        # In pieces.
        server.window.map(fd, 4096, 4096, CHUNK - 4096, writable=True)
        server.window.map(fd, 0, 0, 4096, writable=True)
        for thread in threads:
            thread.join()
        assert sorted(map(str, got)) in (["1", "b'jello'"], ["1", "b'jell!'"])
        assert file.pread(5, 0) == os.pread(fd, 5, 0) == b"jell!"


def test_several_threads_in_a_small_window() -> None:
    server = DaxServer(chunks=2)
    failures: list[BaseException] = []

    def work(guest: Guest, seed: int) -> None:
        choice = random.Random(seed)
        try:
            for _ in range(100):
                number = choice.randrange(4)
                with guest.open(f"/f{number}", os.O_RDWR) as file:
                    file.pwrite(b"%d" % seed, 10 + seed)
                    assert file.pread(7, CHUNK - 3) == b"%03d" % number + b"%04d" % number
        except BaseException as failure:
            failures.append(failure)

    for number in range(4):
        fd = server.add_file(f"f{number}", b"")
        os.pwrite(fd, b"%03d%04d" % (number, number), CHUNK - 3)
    with Guest(server, window=server.window, dax="inode") as guest:
        threads = [threading.Thread(target=work, args=(guest, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for fd in server.fds.values():
        assert os.pread(fd, 4, 10) == b"0123"
        os.close(fd)


# --- mmap ----------------------------------------------------------------------------------------


def test_mmap_is_the_file(guest: Guest, server: DaxServer) -> None:
    fd = server.add_file("f", b"hello")
    with guest.open("/f", os.O_RDWR) as file, guest.open("/f") as reader:
        mapped, read_only = file.mmap(4096), reader.mmap()
        assert (len(mapped), len(read_only)) == (4096, 5)
    mapped[0:1] = b"j"
    os.pwrite(fd, b"!", 5)
    assert (bytes(read_only), bytes(mapped[:7])) == (b"jello", b"jello!\0")
    with pytest.raises(TypeError):
        read_only[0] = 1
    assert sent(guest, lambda: guest.read_bytes("/f"))["SETUPMAPPING"] == 0
    mapped.release()
    read_only.release()


def test_what_mmap_cannot_do(guest: Guest, server: DaxServer) -> None:
    server.add_file("f", b"hello")
    with guest.open("/f", os.O_RDWR) as file:
        for length, offset in ((CHUNK + 1, 0), (2, CHUNK - 1), (0, 0), (-1, 0), (None, 5), (1, -1)):
            with pytest.raises(ValueError, match="within one chunk"):
                file.mmap(length, offset)
    with pytest.raises(OSError) as caught:
        file.mmap()
    assert caught.value.errno == errno.EBADF
    with guest.open("/f", os.O_WRONLY) as file, pytest.raises(PermissionError):
        file.mmap()


def test_a_chunk_stays_as_long_as_a_view_of_it(guest: Guest, server: DaxServer) -> None:
    views = []
    for number in range(4):
        server.add_file(f"f{number}", b"hello %d" % number)
        with guest.open(f"/f{number}") as file:
            views.append(file.mmap())
    del file
    guest.drop_caches()
    server.add_file("more", b"more")
    with pytest.raises(OSError) as caught:
        guest.read_bytes("/more")
    assert caught.value.errno == errno.ENOMEM
    assert [bytes(view) for view in views] == [b"hello %d" % number for number in range(4)]
    part = views.pop(2)[2:]
    gc.collect()
    with pytest.raises(OSError):
        guest.read_bytes("/more")
    assert bytes(part) == b"llo 2"
    del part
    gc.collect()
    assert guest.read_bytes("/more") == b"more"


# --- modes ---------------------------------------------------------------------------------------


def test_never(server: DaxServer) -> None:
    server.add_file("f", b"hello")
    with Guest(server, window=server.window) as guest:
        assert guest.read_bytes("/f") == b"hello"
        assert (guest.requests[Opcode.READ], guest.mapped, server.offered & DAX) == (1, 0, 0)


def test_inode_without_a_window(server: DaxServer) -> None:
    server.add_file("f", b"hello")
    with Guest(server, dax="inode") as guest:
        assert guest.read_bytes("/f") == b"hello"
        assert (guest.requests[Opcode.READ], server.offered & DAX) == (1, InitFlag.HAS_INODE_DAX)


def test_always(server: DaxServer) -> None:
    server.add_file("f", b"hello")
    server.plain.update(server.fds)
    server.add("d", mode=stat.S_IFDIR | 0o755)
    with Guest(server, window=server.window, dax="always") as guest:
        assert (guest.read_bytes("/f"), guest.listdir("/d")) == (b"hello", [])
        assert guest.requests[Opcode.READ] == 0
        assert (server.log[0][0], server.offered & DAX) == ("map", InitFlag.MAP_ALIGNMENT)


def test_always_without_a_window(server: DaxServer) -> None:
    with pytest.raises(UserError, match="no window"):
        Guest(server, dax="always")


def test_a_server_that_cannot_tell_files_apart(server: DaxServer) -> None:
    server.init_flags &= ~InitFlag.HAS_INODE_DAX
    server.add_file("f", b"hello")
    with Guest(server, window=server.window, dax="inode") as guest:
        assert guest.read_bytes("/f") == b"hello"
        assert not server.log


def test_a_server_that_maps_in_larger_units_than_chunks(server: DaxServer) -> None:
    server.map_alignment = 22
    with pytest.raises(OSError, match=r"2\^22 bytes"):
        Guest(server, window=server.window, dax="inode")
