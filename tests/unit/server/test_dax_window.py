"""What is mapped in a guest's window: a front-end and an allocator that answer when and as the test says."""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.server.caching.parking import Parked
from coherent_vfs.server.dax.window import MOST_PIECES, Window
from tests.unit.server.fake_device import leaked, open_fds

PAGE = 4096
SIZE = 8 * CHUNK
PARKED = -1

ExpectLog = Callable[[str], None]


class FrontEnd:
    """As server.vhost_user.backend_channel: answers come later, in order, and at a reset."""

    def __init__(self) -> None:
        self.asked: deque[tuple[str, int, int, int, str, Callable[[int], None]]] = deque()
        self.pieces: dict[int, tuple[int, str, int]] = {}
        """By moffset: length, name of the file, offset in it."""
        self.replaced: int | None = None
        """The moffset at which something must be mapped next."""

    def map(
        self, fd: int, file_offset: int, moffset: int, length: int, writable: bool, done: Callable[[int], None]
    ) -> None:
        assert writable
        assert self.replaced in (None, moffset)
        self.replaced = None
        assert (file_offset | moffset | length) % PAGE == 0
        assert length > 0
        # "/memfd:scratch (deleted)", or a path.
        name = Path(f"/proc/self/fd/{fd}").readlink().name.split(":")[-1].split(" ")[0]
        if name == "scratch":
            assert os.fstat(fd).st_size == length
            assert os.pread(fd, 1, 0) == b"\0", "what was stored into other scratch can be loaded here"
            os.pwrite(fd, b"x", 0)
        self.asked.append(("map", moffset, length, file_offset, name, done))

    def unmap(self, moffset: int, length: int, done: Callable[[int], None], *, replaced: bool = False) -> None:
        assert self.replaced is None
        self.replaced = moffset if replaced else None
        self.asked.append(("unmap", moffset, length, 0, "", done))

    def answer(self, error: int = 0) -> None:
        """Do what was asked for first, or refuse it."""
        what, moffset, length, offset, name, done = self.asked.popleft()
        if not error and what == "map":
            assert not any(
                there < moffset + length and moffset < there + piece[0] for there, piece in self.pieces.items()
            )
            self.pieces[moffset] = length, name, offset
        elif not error:
            assert self.pieces.pop(moffset)[0] == length
        done(error)

    def answer_all(self) -> None:
        while self.asked:
            self.answer()

    def reset(self, window: Window) -> None:
        """As a reset of the device."""
        pending = list(self.asked)
        self.asked.clear()
        self.pieces.clear()
        window.reset()
        for *_, done in pending:
            done(errno.ECONNRESET)


class Allocator:
    """As coherence.client.dax: claims are answered later, in any order."""

    def __init__(self) -> None:
        self.claims: list[tuple[int, int, bool, Callable[[int, int], None]]] = []
        self.held: dict[int, tuple[int, bool]] = {}
        """By moffset: length, and whether the guest may store."""

    def claim(
        self,
        device: int,
        inode: int,
        offset: int,
        length: int,
        moffset: int,
        writable: bool,
        done: Callable[[int, int], None],
    ) -> None:
        self.claims.append((moffset, length, writable, done))

    def answer(self, error: int = 0) -> None:
        moffset, length, writable, done = self.claims.pop(0)
        if not error:
            assert self.held.get(moffset, (length, False)) == (length, False), "claimed twice"
            self.held[moffset] = length, writable
        done(moffset, error)

    def release(self, ranges: list[tuple[int, int]]) -> None:
        for moffset, length in ranges:
            assert self.held.pop(moffset)[0] == length


class View:
    """A view is the file itself."""

    def __init__(self) -> None:
        self.error = 0

    def open(self, fd: int) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return os.dup(fd)


class Files:
    """Files of a directory, by node ids from 1 on."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = dict(enumerate(paths, 1))
        self.known = dict.fromkeys(self.paths, 0)
        """What the guest knows of their sizes."""
        self.scratch: dict[int, int] = {}
        """From where on it has something else mapped."""
        self.woken = 0
        self._fds: dict[int, int] = {}

    def fd(self, nodeid: int) -> int:
        if nodeid not in self.paths:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if nodeid not in self._fds:
            self._fds[nodeid] = os.open(self.paths[nodeid], os.O_PATH)
        return self._fds[nodeid]

    def reopen(self, nodeid: int, flags: int) -> int:
        return os.open(f"/proc/self/fd/{self.fd(nodeid)}", flags)

    def reached(self, nodeid: int) -> int:
        return self.known.get(nodeid, 0)

    def reported_again(self, nodeid: int, size: int) -> None:
        self.known[nodeid] = size

    def revoked_beyond(self, nodeid: int, size: int | None) -> None:
        if size is None:
            self.scratch.pop(nodeid, None)
        else:
            self.scratch[nodeid] = min(size, self.scratch.get(nodeid, size))

    def wake(self) -> None:
        self.woken += 1

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


class Bench:
    """A window, and a guest that knows files a (1), b (2) and a FIFO (3)."""

    def __init__(self, directory: Path) -> None:
        self.paths = [directory / "a", directory / "b", directory / "fifo"]
        for path in self.paths[:2]:
            path.touch()
            os.truncate(path, 4 * CHUNK)
        os.mkfifo(self.paths[2])
        self.files = Files(self.paths)
        self.files.known = {1: 4 * CHUNK, 2: 4 * CHUNK}
        self.front_end, self.allocator, self.view = FrontEnd(), Allocator(), View()
        self.window = Window(SIZE, self.front_end, self.allocator, self.view, self.files)
        self.revocations = 0

    def set_up(
        self, unique: int, nodeid: int = 1, offset: int = 0, length: int = 1, moffset: int = 0, writable: bool = False
    ) -> int:
        """Serve a SETUPMAPPING, which may have been served before; offset, length, moffset: chunks."""
        return self._served(
            lambda: self.window.set_up(unique, nodeid, offset * CHUNK, length * CHUNK, writable, moffset * CHUNK)
        )

    def remove(self, unique: int, *ranges: int) -> int:
        return self._served(lambda: self.window.remove(unique, [(moffset * CHUNK, CHUNK) for moffset in ranges]))

    def map(self, nodeid: int = 1, offset: int = 0, length: int = 1, moffset: int = 0, writable: bool = False) -> None:
        """A SETUPMAPPING that succeeds."""
        wanted = 1_000_000, nodeid, offset, length, moffset, writable
        while self.set_up(*wanted) == PARKED:
            self.go_on()

    def go_on(self) -> None:
        """All answer what they were asked for."""
        while self.front_end.asked or self.allocator.claims:
            self.front_end.answer_all()
            if self.allocator.claims:
                self.allocator.answer()

    def inode(self, nodeid: int) -> tuple[int, int]:
        status = self.paths[nodeid - 1].stat()
        return status.st_dev, status.st_ino

    def revoke(self, size: int, nodeid: int = 1) -> None:
        def done() -> None:
            self.revocations += 1

        self.window.revoke(*self.inode(nodeid), size, done)

    def resize(self, nodeid: int = 1) -> None:
        self.window.resize(*self.inode(nodeid))

    @property
    def mapped(self) -> list[tuple[float, float, str]]:
        """Moffsets and lengths (chunks) as the front-end has them, and what is there."""
        return [
            (moffset / CHUNK, length / CHUNK, name)
            for moffset, (length, name, _) in sorted(self.front_end.pieces.items())
        ]

    def consistent(self) -> None:
        """What is mapped was claimed, and nothing else is claimed."""
        assert not self.front_end.asked
        assert not self.allocator.claims
        claimed = sum(length for length, _ in self.allocator.held.values())
        assert sum(length for length, _, _ in self.front_end.pieces.values()) == claimed == self.window.mapped

    @staticmethod
    def _served(request: Callable[[], None]) -> int:
        try:
            request()
        except Parked as parked:
            assert parked.args
            return PARKED
        except OSError as error:
            assert error.errno
            return error.errno
        return 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    before = open_fds()
    bench = Bench(tmp_path)
    yield bench
    bench.window.reset()
    bench.files.close()
    assert not leaked(before)
    assert not bench.allocator.held


# --- requests -----------------------------------------------------------------------------------------------


def test_a_mapping_is_claimed_then_mapped_and_goes(bench: Bench) -> None:
    assert bench.set_up(1, offset=1, moffset=2) == PARKED
    assert not bench.front_end.asked
    bench.allocator.answer()
    assert bench.set_up(1, offset=1, moffset=2) == PARKED
    bench.front_end.answer()
    assert bench.files.woken
    assert bench.set_up(1, offset=1, moffset=2) == 0
    assert bench.front_end.pieces == {2 * CHUNK: (CHUNK, "a", CHUNK)}
    bench.consistent()
    assert bench.remove(2, 2, 5) == PARKED
    bench.go_on()
    assert bench.remove(2, 2, 5) == 0
    assert bench.mapped == []
    bench.consistent()


@pytest.mark.parametrize(
    ("offset", "length", "moffset"),
    [(1, CHUNK, 0), (0, CHUNK, 1), (0, PAGE, 0), (0, 0, 0), (0, CHUNK, SIZE), (0, 1 << 63, 0), (0, 2 * SIZE, 0)],
)
def test_what_is_no_part_of_the_window_is_refused(bench: Bench, offset: int, length: int, moffset: int) -> None:
    with pytest.raises(OSError) as caught:
        bench.window.set_up(1, 1, offset, length, False, moffset)
    assert caught.value.errno == errno.EINVAL
    assert not bench.allocator.claims


def test_only_regular_files_are_opened(bench: Bench) -> None:
    assert bench.set_up(1, 3) == errno.EINVAL
    assert bench.set_up(1, 4) == errno.ESTALE
    assert not bench.allocator.claims


def test_a_claim_that_is_refused(bench: Bench) -> None:
    assert bench.set_up(1) == PARKED
    bench.allocator.answer(errno.ENOSPC)
    assert bench.set_up(1) == errno.ENOSPC
    bench.consistent()


def test_a_map_that_is_refused_is_given_back(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("the virtual machine does not map a file")
    assert bench.set_up(1) == PARKED
    bench.allocator.answer()
    bench.front_end.answer(errno.EINVAL)
    assert bench.set_up(1) == errno.EINVAL
    bench.consistent()


def test_a_file_that_cannot_be_viewed(bench: Bench) -> None:
    bench.view.error = errno.ENOTCONN
    assert bench.set_up(1) == PARKED
    bench.allocator.answer()
    assert bench.set_up(1) == errno.ENOTCONN
    bench.consistent()


def test_a_file_that_the_guest_forgot_meanwhile(bench: Bench) -> None:
    assert bench.set_up(1) == PARKED
    del bench.files.paths[1]
    bench.allocator.answer()
    assert bench.set_up(1) == errno.ESTALE
    bench.consistent()


def test_a_place_that_is_taken_is_emptied_first(bench: Bench) -> None:
    bench.map(1, length=2)
    bench.map(2, moffset=1)
    assert bench.mapped == [(1, 1, "b")]
    bench.consistent()


def test_the_same_again_is_there_already(bench: Bench) -> None:
    bench.map(writable=True)
    assert bench.set_up(1) == bench.set_up(2, writable=True) == 0
    bench.consistent()


def test_upgrade_to_writable(bench: Bench) -> None:
    bench.map()
    assert bench.set_up(1, writable=True) == PARKED
    # It stays claimed meanwhile: whoever makes the file smaller asks us.
    assert bench.allocator.held == {0: (CHUNK, False)}
    bench.allocator.answer()
    assert bench.set_up(1, writable=True) == 0
    assert bench.allocator.held == {0: (CHUNK, True)}
    bench.consistent()


def test_an_upgrade_that_is_refused_is_told(bench: Bench) -> None:
    bench.map()
    assert bench.set_up(1, writable=True) == PARKED
    bench.allocator.answer(errno.EAGAIN)
    assert bench.set_up(1, writable=True) == errno.EAGAIN
    bench.consistent()


@pytest.mark.parametrize("error", [0, errno.EAGAIN])
@pytest.mark.parametrize("how", ["remove", "reset", "session"])
def test_what_goes_while_it_is_upgraded_is_given_back(bench: Bench, how: str, error: int) -> None:
    bench.map()
    assert bench.set_up(1, writable=True) == PARKED
    if how == "remove":
        assert bench.remove(2, 0) == PARKED
    elif how == "reset":
        bench.front_end.reset(bench.window)
    else:
        bench.window.begin_session()
    bench.front_end.answer_all()
    assert bench.allocator.held
    # Nobody else is let in before.
    assert bench.set_up(3, 2) == PARKED
    assert len(bench.allocator.claims) == 1
    bench.allocator.answer(error)
    assert not bench.allocator.held
    bench.map(2)
    bench.consistent()


def test_what_is_being_removed_is_not_there_any_more(bench: Bench) -> None:
    bench.map()
    assert bench.remove(1, 0) == PARKED
    # The guest does not wait for it: it was interrupted.
    bench.window.forget(1)
    bench.map()
    assert bench.mapped == [(0, 1, "a")]
    bench.consistent()


def test_a_request_that_is_not_waited_for_is_in_nobodys_way(bench: Bench) -> None:
    assert bench.set_up(1) == PARKED
    bench.window.forget(1)
    assert bench.set_up(2, 2) == PARKED
    assert len(bench.allocator.claims) == 1
    bench.allocator.answer()
    assert bench.set_up(2, 2) == PARKED
    bench.go_on()
    assert bench.set_up(2, 2) == 0
    assert bench.mapped == [(0, 1, "b")]
    bench.consistent()


def test_any_number_of_requests_behind_a_slow_one(bench: Bench) -> None:
    bench.map()
    assert bench.remove(1, 0) == PARKED
    uniques = range(2, 3000)
    for unique in uniques:
        assert bench.remove(unique, 5) == PARKED
        bench.resize()
    bench.front_end.answer()
    assert {bench.remove(unique, 5) for unique in uniques} == {0}
    assert bench.remove(1, 0) == 0


# --- resets -------------------------------------------------------------------------------------------------


def test_a_reset_in_any_step_leaves_nothing(bench: Bench) -> None:
    for steps in range(20):
        bench.map(2, moffset=5)
        os.truncate(bench.paths[0], 4 * CHUNK)
        bench.files.known[1] = 4 * CHUNK
        bench.set_up(1, length=2)
        bench.revoke(100)
        bench.remove(2, 5)
        for _ in range(steps):
            if bench.allocator.claims:
                bench.allocator.answer()
            elif bench.front_end.asked:
                bench.front_end.answer()
        bench.front_end.reset(bench.window)
        assert not bench.front_end.asked, "something is asked for after a reset"
        bench.go_on()
        assert bench.mapped == []
        assert not bench.allocator.held
        bench.consistent()
        bench.map(2)
        bench.consistent()
        bench.front_end.reset(bench.window)
        bench.resize()


def test_a_new_session_in_any_step_leaves_nothing(bench: Bench) -> None:
    for steps in range(12):
        bench.map(2, moffset=5)
        bench.set_up(1, length=2)
        for _ in range(steps):
            if bench.allocator.claims:
                bench.allocator.answer()
            elif bench.front_end.asked:
                bench.front_end.answer()
        bench.window.begin_session()
        # The same at the same moffset: it is not what is being taken away.
        assert bench.set_up(7, 2, moffset=5) == PARKED
        bench.go_on()
        assert bench.set_up(7, 2, moffset=5) == 0
        assert bench.mapped == [(5, 1, "b")]
        bench.consistent()


# --- ends of files ------------------------------------------------------------------------------------------


def test_whole_chunks_are_revoked_and_restored(bench: Bench) -> None:
    bench.map(length=4)
    bench.map(2, moffset=5)
    bench.revoke(2 * CHUNK)
    assert bench.revocations == 0
    bench.front_end.answer_all()
    assert bench.revocations == 1
    assert bench.mapped == [(0, 2, "a"), (2, 1, "scratch"), (3, 1, "scratch"), (5, 1, "b")]
    assert bench.files.scratch == {1: 2 * CHUNK}
    # Not as long as the other one has not said that it is done.
    bench.window.restore(1, 4 * CHUNK)
    assert not bench.front_end.asked
    os.truncate(bench.paths[0], 2 * CHUNK)
    bench.resize()
    bench.go_on()
    assert bench.files.scratch == {1: 2 * CHUNK}
    bench.window.restore(1, 4 * CHUNK)
    bench.window.restore(1, 4 * CHUNK)
    bench.go_on()
    assert bench.mapped == [(0, 2, "a"), (2, 2, "a"), (5, 1, "b")]
    assert bench.files.scratch == {}
    bench.consistent()


def test_no_more_is_restored_than_the_guest_is_told_of(bench: Bench) -> None:
    """What it may know of beyond would be revoked again at the next look, with nothing there for a moment."""
    bench.map(length=2)
    bench.revoke(PAGE)
    os.truncate(bench.paths[0], PAGE)
    bench.resize()
    bench.go_on()
    os.truncate(bench.paths[0], CHUNK + 1)
    bench.window.restore(1, CHUNK + 1)
    bench.go_on()
    assert bench.front_end.pieces == {
        0: (PAGE, "a", 0),
        PAGE: (CHUNK, "a", PAGE),
        CHUNK + PAGE: (CHUNK - PAGE, "scratch", 0),
    }
    assert bench.files.scratch == {1: CHUNK + 1}
    bench.resize()
    assert not bench.front_end.asked
    bench.consistent()


def test_a_file_that_grows_in_small_pieces_is_restored_whole_in_the_end(bench: Bench) -> None:
    bench.map(length=1)
    bench.revoke(0)
    os.truncate(bench.paths[0], 0)
    bench.resize()
    bench.go_on()
    for pages in range(1, 20):
        os.truncate(bench.paths[0], pages * PAGE)
        if bench.files.scratch:
            bench.window.restore(1, pages * PAGE)
            bench.go_on()
        assert len(bench.front_end.pieces) <= MOST_PIECES + 2
        # What was restored is not revoked again at the next look, as the guest would miss it meanwhile.
        before = dict(bench.front_end.pieces)
        bench.resize()
        bench.go_on()
        assert bench.front_end.pieces == before
    assert bench.files.scratch == {}
    bench.consistent()


def test_the_middle_of_a_chunk(bench: Bench) -> None:
    bench.map(length=1)
    bench.revoke(PAGE + 1)
    bench.go_on()
    assert bench.front_end.pieces == {0: (2 * PAGE, "a", 0), 2 * PAGE: (CHUNK - 2 * PAGE, "scratch", 0)}
    bench.revoke(1)
    bench.go_on()
    assert bench.front_end.pieces == {0: (PAGE, "a", 0), PAGE: (CHUNK - PAGE, "scratch", 0)}
    bench.revoke(0)
    bench.go_on()
    assert bench.front_end.pieces == {0: (CHUNK, "scratch", 0)}
    assert bench.revocations == 3
    assert bench.remove(1, 0) == PARKED
    bench.go_on()
    assert bench.mapped == []
    bench.consistent()


def test_a_later_larger_end_does_not_hide_scratch(bench: Bench) -> None:
    bench.map(length=4)
    bench.revoke(CHUNK)
    bench.revoke(3 * CHUNK)
    bench.go_on()
    assert bench.files.scratch == {1: CHUNK}
    os.truncate(bench.paths[0], 2 * CHUNK)
    bench.resize()
    bench.go_on()
    assert bench.files.scratch == {1: CHUNK}


def test_what_the_guest_does_not_know_of_stays_but_is_not_told_now(bench: Bench) -> None:
    bench.files.known[1] = CHUNK
    bench.map(length=4)
    bench.revoke(2 * CHUNK)
    assert bench.revocations == 1
    assert bench.mapped == [(0, 4, "a")]
    # It would go there as soon as it is told of what is about to go.
    assert bench.files.scratch == {1: 2 * CHUNK}


def test_a_mapping_by_an_old_size_gets_scratch(bench: Bench) -> None:
    os.truncate(bench.paths[0], CHUNK + 1)
    bench.map(length=3)
    assert bench.front_end.pieces == {
        0: (CHUNK + PAGE, "a", 0),
        CHUNK + PAGE: (CHUNK, "scratch", 0),
        2 * CHUNK + PAGE: (CHUNK - PAGE, "scratch", 0),
    }
    assert bench.files.scratch == {1: CHUNK + 1}
    bench.window.restore(1, 4 * CHUNK)
    bench.go_on()
    assert bench.files.scratch == {}
    bench.consistent()


def test_a_file_that_the_host_cut_off(bench: Bench) -> None:
    bench.map(length=2)
    os.truncate(bench.paths[0], CHUNK)
    bench.resize()
    bench.go_on()
    assert bench.mapped == [(0, 1, "a"), (1, 1, "scratch")]
    bench.resize(2)
    assert not bench.front_end.asked


def test_a_revocation_waits_for_no_claim(bench: Bench) -> None:
    bench.map(length=1)
    assert bench.set_up(1, offset=1, moffset=1) == PARKED
    bench.revoke(0)
    bench.front_end.answer_all()
    assert bench.revocations == 1
    os.truncate(bench.paths[0], 0)
    bench.resize()
    bench.go_on()
    assert bench.set_up(1, offset=1, moffset=1) == 0
    assert bench.mapped == [(0, 1, "scratch"), (1, 1, "scratch")]
    bench.consistent()


def test_a_revocation_is_answered_where_there_can_be_no_scratch(
    bench: Bench, expect_log: ExpectLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("the virtual machine does not map a file")

    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    bench.map(length=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        bench.revoke(CHUNK)
        bench.go_on()
    assert bench.revocations == 1
    # Nothing of the file is left beyond its end.
    assert bench.mapped == [(0, 1, "a")]


def test_a_revocation_is_answered_whatever_the_front_end_does(bench: Bench, expect_log: ExpectLog) -> None:
    expect_log("the virtual machine does not map a file")
    bench.map(length=2)
    bench.revoke(CHUNK)
    while bench.front_end.asked:
        bench.front_end.answer(errno.EIO)
    assert bench.revocations == 1
    bench.revoke(0)
    bench.front_end.reset(bench.window)
    assert bench.revocations == 2


def test_anything_in_any_order(bench: Bench) -> None:
    chance = random.Random(4)
    asked = 0
    waiting: dict[int, Callable[[], int]] = {}

    def set_up(unique: int) -> Callable[[], int]:
        nodeid, offset, length = chance.randrange(1, 3), chance.randrange(4), chance.randrange(1, 3)
        moffset, writable = chance.randrange(7), chance.random() < 0.5
        return lambda: bench.set_up(unique, nodeid, offset, length, moffset, writable)

    def remove(unique: int) -> Callable[[], int]:
        moffset = chance.randrange(8)
        return lambda: bench.remove(unique, moffset)

    for unique in range(3000):
        match chance.randrange(12):
            case 0 | 1 | 2:
                waiting[unique] = chance.choice((set_up, remove))(unique)
            case 3:
                asked += 1
                bench.revoke(chance.randrange(4 * CHUNK), chance.randrange(1, 3))
            case 4:
                bench.resize(chance.randrange(1, 3))
            case 5:
                bench.window.restore(chance.randrange(1, 3), chance.randrange(5 * CHUNK))
            case 6 if chance.random() < 0.2:
                bench.window.begin_session()
            case 7 if chance.random() < 0.2:
                bench.front_end.reset(bench.window)
            case 8 if waiting:
                bench.window.forget(waiting.popitem()[0])
            case 9 | 10 if bench.front_end.asked:
                bench.front_end.answer()
            case 11 if bench.allocator.claims:
                bench.allocator.answer(chance.choice((0, 0, 0, errno.EAGAIN)))
        waiting = {one: request for one, request in waiting.items() if request() == PARKED}
    bench.go_on()
    while waiting:
        waiting = {one: request for one, request in waiting.items() if request() == PARKED}
        bench.go_on()
    assert bench.revocations == asked
    bench.consistent()


# --- what goes at once --------------------------------------------------------------------------------------


def test_a_session_ends_when_nothing_is_mapped_any_more(bench: Bench) -> None:
    for moffset in range(3):
        bench.map(nodeid=1 + moffset % 2, moffset=moffset)
    assert not bench.window.emptied(7)
    assert [what for what, *_ in bench.front_end.asked] == ["unmap"] * 3, "all at once"
    bench.front_end.answer()
    assert not bench.window.emptied(7)
    woken = bench.files.woken
    bench.go_on()
    assert bench.files.woken > woken
    assert bench.window.emptied(7)
    assert bench.mapped == []
    bench.consistent()
    assert bench.window.emptied(8), "nothing is there to wait for"


def test_a_session_ends_though_the_front_end_refuses(bench: Bench) -> None:
    bench.map()
    assert not bench.window.emptied(7)
    bench.front_end.answer(errno.EIO)
    assert bench.window.emptied(7)
    assert bench.window.mapped == 0


def test_what_was_about_to_be_mapped_is_not_when_the_session_has_ended(bench: Bench) -> None:
    assert bench.set_up(1) == PARKED
    assert bench.window.emptied(7)
    bench.allocator.answer()
    bench.consistent()
    assert bench.mapped == []


def test_what_is_before_the_new_end_comes_back_at_once_or_stays(bench: Bench) -> None:
    def asked() -> list[tuple[str, float, float, str]]:
        return [
            (what, moffset / CHUNK, length / CHUNK, name) for what, moffset, length, _, name, _ in bench.front_end.asked
        ]

    bench.map()
    bench.revoke(CHUNK // 2)
    assert asked() == [("unmap", 0, 1, ""), ("map", 0, 0.5, "a"), ("map", 0.5, 0.5, "scratch")], "nothing is awaited"
    bench.go_on()
    bench.resize()
    os.truncate(bench.paths[0], CHUNK // 2)
    bench.files.known[1] = CHUNK // 2
    bench.window.restore(1, CHUNK)
    bench.go_on()
    assert bench.mapped == [(0, 0.5, "a"), (0.5, 0.5, "a")]
    bench.files.known[1] = CHUNK
    bench.revoke(3 * CHUNK // 4)
    assert asked() == [("unmap", 0.5, 0.5, ""), ("map", 0.5, 0.25, "a"), ("map", 0.75, 0.25, "scratch")]
    bench.go_on()
    bench.consistent()


def test_no_chunk_falls_into_ever_smaller_pieces(bench: Bench) -> None:
    bench.map()
    for number in range(1, 30):
        bench.window.restore(1, CHUNK)
        bench.go_on()
        bench.files.known[1] = CHUNK
        bench.revoke(CHUNK // 2 + number * PAGE)
        bench.go_on()
        bench.resize()
        bench.go_on()
        bench.files.known[1] = CHUNK // 2 + number * PAGE
        assert len(bench.mapped) <= MOST_PIECES + 3
    bench.consistent()
