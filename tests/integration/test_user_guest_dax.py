"""User-space guests with DAX windows, on real back-ends of one domain. Needs what views of files need."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.guest.guest import Guest
from coherent_vfs.server.fuse.protocol import Opcode
from tests.integration.coherenced_process import Coherenced, eventually
from tests.integration.user_guests import Backend, requests_of
from tests.views import need_views

WINDOW = 8 * CHUNK
TRANSFERS = (Opcode.READ, Opcode.WRITE)


class World:
    """A coherenced, two back-ends "a" and "b" that serve one directory with DAX, and guests on them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.share = directory / "share"
        self.share.mkdir()
        self.daemon = stack.enter_context(Coherenced(directory))
        self.daemon.start()
        options = ("--dax", "always", "--dax-window", str(WINDOW))
        self.backends = [
            stack.enter_context(
                Backend(self.share, directory, name=name, cache="shared", daemon=self.daemon, options=options)
            )
            for name in ("a", "b")
        ]

    def guest(self, number: int) -> Guest:
        """A guest on a back-end, which checks the table."""
        backend = self.backends[number]
        return Guest.connect(backend.socket, table=self.daemon.paths.table, timeout=10, dax="inode")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for all tests; on a disk, as what is shared is."""
    need_views()
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        with ExitStack() as stack:
            yield World(directory, stack)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def guests(world: World) -> Iterator[tuple[Guest, Guest]]:
    """A guest on each back-end."""
    with world.guest(0) as first, world.guest(1) as second:
        assert first.aware
        yield first, second


@pytest.fixture
def path(world: World) -> Iterator[Path]:
    """A file of 5000 bytes, on the host; for guests it is /f."""
    path = world.share / "f"
    path.write_bytes(b"hello" * 1000)
    yield path
    path.unlink()


def test_stores_are_seen_by_all(guests: tuple[Guest, Guest], path: Path) -> None:
    first, second = guests
    with first.open("/f", os.O_RDWR) as one, second.open("/f", os.O_RDWR) as other, path.open("r+b", 0) as host:
        one.pwrite(b"one", 0)
        other.pwrite(b"other", 10)
        host.seek(4995)
        host.write(b"host!")
        for read in (one.pread, other.pread, lambda size, offset: os.pread(host.fileno(), size, offset)):
            assert (read(5, 0), read(5, 10), read(10, 4995)) == (b"onelo", b"other", b"host!")
        mapped, read_only = one.mmap(), second.open("/f")
        with read_only:
            view = read_only.mmap()
        mapped[100:103] = b"abc"
        assert (bytes(view[100:103]), os.pread(host.fileno(), 3, 100)) == (b"abc", b"abc")
    assert not any(guest.requests[opcode] for guest in guests for opcode in TRANSFERS)
    assert [guest.mapped for guest in guests] == [CHUNK, CHUNK]


def test_growth(guests: tuple[Guest, Guest], path: Path) -> None:
    first, second = guests
    with first.open("/f", os.O_RDWR) as one, second.open("/f") as other:
        assert one.pread(1, 4999) == other.pread(1, 4999) == b"o"
        one.pwrite(b"x" * 100, 5000)
        assert other.pread(200, 5000) == b"x" * 100
        one.pwrite(b"y", 2 * CHUNK)
        assert other.pread(2, 2 * CHUNK - 1) == b"\0y"
        with path.open("ab") as host:
            host.write(b"z" * 5000)
        # What the host does is seen when its watch has told.
        eventually(lambda: other.pread(5001, 2 * CHUNK) == b"y" + b"z" * 5000)
    assert first.requests[Opcode.WRITE] == 2


def test_truncation_by_another_guest_kills_nobody(guests: tuple[Guest, Guest], path: Path) -> None:
    first, second = guests
    os.truncate(path, 2 * CHUNK)
    with first.open("/f", os.O_RDWR) as one, second.open("/f", os.O_RDWR) as other:
        views = [one.mmap(CHUNK, offset) for offset in (0, CHUNK)]
        for view in views:
            view[-10:] = b"0123456789"
        other.truncate(5000)
        assert (one.stat().st_size, one.pread(100, 4998)) == (5000, b"lo")
        # A program that still goes beyond the end gets something, but nothing of it comes into the file.
        for view in views:
            bytes(view)
            view[5000:] = b"!" * (CHUNK - 5000)
        assert bytes(views[0][:5000]) == path.read_bytes()[:5000] == b"hello" * 1000
        other.truncate(2 * CHUNK)
        assert one.pread(10, 2 * CHUNK - 10) == bytes(10)
        views[1][-10:] = b"9876543210"
        assert other.pread(10, 2 * CHUNK - 10) == path.read_bytes()[-10:] == b"9876543210"
        for view in views:
            view.release()
    assert path.read_bytes()[8192:CHUNK] == bytes(CHUNK - 8192)


def test_what_is_before_the_new_end_is_there_all_the_time(guests: tuple[Guest, Guest], path: Path) -> None:
    """Also while another guest truncates the same chunk: this front-end replaces what is mapped in one step."""
    first, second = guests
    os.truncate(path, CHUNK)
    with first.open("/f", os.O_RDWR) as one, second.open("/f", os.O_RDWR) as other:
        view, stop = one.mmap(CHUNK), threading.Event()
        seen: set[int] = set()
        stores = 0

        def look() -> None:
            nonlocal stores
            while not stop.is_set():
                seen.add(view[0])
                stores += 1
                view[1] = (view[1] + 1) % 256

        thread = threading.Thread(target=look)
        thread.start()
        for size in (5000, CHUNK // 2, 4096, CHUNK - 1) * 3:
            other.truncate(size)
            other.truncate(CHUNK)
            assert one.stat().st_size == CHUNK
        stop.set()
        thread.join()
        assert seen == {ord("h")}
        assert path.read_bytes()[1] == (ord("e") + stores) % 256, "no store is lost"
        view.release()


def test_a_file_larger_than_the_window(guests: tuple[Guest, Guest], path: Path) -> None:
    first, second = guests
    size = 2 * WINDOW + 1000
    os.truncate(path, size)
    noise = random.Random(1).randbytes(5000)
    with first.open("/f", os.O_RDWR) as one, second.open("/f") as other:
        for offset in range(CHUNK - 2500, size - 5000, CHUNK):
            one.pwrite(noise, offset)
            assert other.pread(5000, offset) == noise
        assert first.mapped == second.mapped == WINDOW
    content = path.read_bytes()
    assert all(content[offset : offset + 5000] == noise for offset in range(CHUNK - 2500, size - 5000, CHUNK))
    assert first.requests[Opcode.REMOVEMAPPING] >= 8


def test_against_a_model(guests: tuple[Guest, Guest], path: Path) -> None:
    """Two guests and the host change one file at random, each in turn; all see the same after each step."""
    choice = random.Random(20)
    model = bytearray(path.read_bytes())
    with guests[0].open("/f", os.O_RDWR) as one, guests[1].open("/f", os.O_RDWR) as other:
        for _ in range(150):
            file, rest = choice.choice(((one, other), (other, one)))
            offset = choice.choice((0, CHUNK, 2 * CHUNK)) + choice.randrange(10_000)
            match choice.choice(("write", "write", "write", "truncate", "grow")):
                case "write":
                    data = choice.randbytes(choice.randrange(1, 6000))
                    model.extend(bytes(max(0, offset - len(model))))
                    model[offset : offset + len(data)] = data
                    file.pwrite(data, offset)
                case "truncate":
                    del model[offset:]
                    file.truncate(len(model))
                case "grow":
                    model.extend(bytes(max(0, offset - len(model))))
                    file.truncate(len(model))
            at = choice.choice((0, CHUNK, 2 * CHUNK)) + choice.randrange(10_000)
            expected = bytes(model[at : at + 8000])
            assert rest.pread(8000, at) == expected
            assert file.pread(8000, at) == expected
            assert rest.stat().st_size == file.stat().st_size == len(model)
        assert path.read_bytes() == model
    assert all(guest.requests[Opcode.READ] == 0 for guest in guests)


def test_a_guest_without_dax_beside_one(world: World, guests: tuple[Guest, Guest], path: Path) -> None:
    backend = world.backends[1]
    guests[1].close()
    stock = Guest.connect(backend.socket, table=world.daemon.paths.table, timeout=10)
    with stock, guests[0].open("/f", os.O_RDWR) as mapped, stock.open("/f", os.O_RDWR) as file:
        for number in range(20):
            mapped.pwrite(b"%05d" % number, 100)
            assert file.pread(5, 100) == b"%05d" % number
            file.pwrite(b"%05d" % number, 200)
            assert mapped.pread(5, 200) == b"%05d" % number
    assert (stock.mapped, stock.requests[Opcode.SETUPMAPPING]) == (0, 0)


def test_what_is_mapped_takes_no_request_while_nobody_stores(guests: tuple[Guest, Guest], path: Path) -> None:
    with guests[0].open("/f") as file:
        eventually(lambda: not requests_of(guests[0], lambda: file.pread(5, 0)))
        assert file.pread(5, 0) == b"hello"


def test_the_backend_dies(world: World, path: Path) -> None:
    with world.guest(0) as guest, guest.open("/f", os.O_RDWR) as file:
        mapped = file.mmap()
        world.backends[0].kill()
        with pytest.raises(OSError) as caught:
            file.mmap(1, CHUNK)
        assert caught.value.errno == errno.ENOTCONN
        mapped[:5] = b"still"
        assert path.read_bytes()[:5] == b"still"
        with pytest.raises(OSError):
            file.close()
    mapped.release()
    world.backends[0].start()
    with world.guest(0) as guest:
        assert guest.read_bytes("/f")[:5] == b"still"
        assert guest.mapped == CHUNK
