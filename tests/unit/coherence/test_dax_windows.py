"""Windows against a naive model of them, and what they refuse."""

from __future__ import annotations

import errno
import random
import time

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coherent_vfs.coherence.daemon.dax.windows import MAX_FILE_SIZE, Refusal, Window, Windows
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import Mapping

CHUNKS = 64
GUESTS = 8
TOTAL = 300 * CHUNK

guests = st.integers(0, GUESTS - 1)
files = st.tuples(st.integers(1, 2), st.integers(1, 3))
# Mostly right, sometimes not.
moffsets = st.integers(0, CHUNKS).map(lambda n: n * CHUNK) | st.sampled_from(
    [1, 4096, CHUNK - 1, 1 << 63, (1 << 64) - 1]
)
offsets = st.integers(0, 8).map(lambda n: n * CHUNK) | st.sampled_from([1, 4096, MAX_FILE_SIZE, (1 << 64) - CHUNK])
lengths = st.sampled_from([1, 1, 1, 2, 3, 16]).map(lambda n: n * CHUNK) | st.sampled_from([0, 1, 4096, 1 << 62])


def overlap(one: Mapping, other: Mapping) -> bool:
    return one.moffset < other.moffset + other.length and other.moffset < one.moffset + one.length


class AgainstNaiveModel(RuleBasedStateMachine):
    """Guests come, map, go, and the daemon is started again; the model is a list of mappings for each guest."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = Windows(CHUNKS * CHUNK, TOTAL)
        self.live: dict[int, Window] = {}
        self.model: dict[int, list[Mapping]] = {}

    @property
    def mapped(self) -> int:
        return sum(mapping.length for mappings in self.model.values() for mapping in mappings)

    def expected(self, guest: int, wanted: Mapping, chosen: bool) -> Mapping | int:
        """What must be granted, or the errno."""
        aligned = wanted.length > 0 and not (wanted.length | wanted.offset | wanted.moffset) % CHUNK
        if not aligned or wanted.moffset + wanted.length > CHUNKS * CHUNK:
            return errno.EINVAL
        if wanted.offset + wanted.length > MAX_FILE_SIZE:
            return errno.EINVAL
        if chosen and wanted.writable and msgspec.structs.replace(wanted, writable=False) in self.model[guest]:
            return wanted
        for moffset in [wanted.moffset] if chosen else range(0, CHUNKS * CHUNK - wanted.length + 1, CHUNK):
            there = Mapping(wanted.device, wanted.inode, wanted.offset, wanted.length, moffset, wanted.writable)
            if not any(overlap(there, other) for other in self.model[guest]):
                return there
        return errno.EBUSY if chosen else errno.ENOSPC

    @rule(guest=guests)
    def start(self, guest: int) -> None:
        if guest in self.live:
            return
        try:
            window = self.windows.add(CHUNKS * CHUNK)
        except Refusal as refusal:
            assert refusal.errno == errno.EDQUOT
            assert (len(self.live) + 1) * CHUNKS * CHUNK > TOTAL
        else:
            assert (len(self.live) + 1) * CHUNKS * CHUNK <= TOTAL
            self.live[guest] = window
            self.model[guest] = []

    @precondition(lambda self: self.live)
    @rule(
        guest=guests, file=files, offset=offsets, length=lengths, moffset=st.none() | moffsets, writable=st.booleans()
    )
    def claim(
        self, guest: int, file: tuple[int, int], offset: int, length: int, moffset: int | None, writable: bool
    ) -> None:
        if guest not in self.live:
            return
        expected = self.expected(guest, Mapping(*file, offset, length, moffset or 0, writable), moffset is not None)
        try:
            granted = self.windows.claim(self.live[guest], *file, offset, length, moffset, writable)
        except Refusal as refusal:
            assert refusal.errno == expected
        else:
            assert granted == expected
            self.model[guest] = [one for one in self.model[guest] if not overlap(one, granted)] + [granted]

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def upgrade(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from([guest for guest, mappings in self.model.items() if mappings]))
        mapping = data.draw(st.sampled_from(self.model[guest]))
        self.claim(guest, (mapping.device, mapping.inode), mapping.offset, mapping.length, mapping.moffset, True)

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from([guest for guest, mappings in self.model.items() if mappings]))
        mapping = data.draw(st.sampled_from(self.model[guest]))
        assert self.windows.release(self.live[guest], mapping.moffset, mapping.length) == mapping
        self.model[guest].remove(mapping)
        with pytest.raises(Refusal):
            self.windows.release(self.live[guest], mapping.moffset, mapping.length)

    @precondition(lambda self: self.live)
    @rule(guest=guests, moffset=moffsets, length=lengths)
    def release_what_may_not_be_there(self, guest: int, moffset: int, length: int) -> None:
        if guest not in self.live:
            return
        there = [one for one in self.model[guest] if (one.moffset, one.length) == (moffset, length)]
        try:
            released = self.windows.release(self.live[guest], moffset, length)
        except Refusal as refusal:
            assert refusal.errno == errno.EINVAL
            assert not there
        else:
            assert [released] == there
            self.model[guest].remove(released)

    @rule(guest=guests)
    def kill(self, guest: int) -> None:
        if guest in self.live:
            self.windows.remove(self.live.pop(guest))
            del self.model[guest]

    @rule(seed=st.integers(), total=st.sampled_from([0, TOTAL]))
    def restart_the_daemon(self, seed: int, total: int) -> None:
        self.windows = Windows(CHUNKS * CHUNK, total)
        for guest in self.live:
            window = self.live[guest] = self.windows.add(CHUNKS * CHUNK, returning=True)
            for mapping in random.Random(seed).sample(self.model[guest], len(self.model[guest])):
                self.windows.restore(window, mapping)
                with pytest.raises(Refusal):
                    self.windows.restore(window, mapping)
        self.windows.total_limit = TOTAL

    @rule(file=files, size=st.integers(-1, 9 * CHUNK))
    def truncate(self, file: tuple[int, int], size: int) -> None:
        numbers = {
            self.live[guest].number
            for guest, mappings in self.model.items()
            if any((m.device, m.inode) == file and m.offset + m.length > size for m in mappings)
        }
        assert self.windows.beyond(file, size) == numbers

    @invariant()
    def everything_adds_up(self) -> None:
        mappings = [mapping for mappings in self.model.values() for mapping in mappings]
        assert len(self.windows) == len(self.live)
        assert (self.windows.mappings, self.windows.mapped) == (len(mappings), self.mapped)
        for guest, window in self.live.items():
            assert list(window) == sorted(self.model[guest], key=lambda mapping: mapping.moffset)
            assert (window.mappings, window.mapped) == (len(list(window)), sum(m.length for m in window))
            assert sum(chunk is not None for chunk in window.chunks) * CHUNK == window.mapped
        by_file: dict[tuple[int, int], int] = {}
        for mapping in mappings:
            file = mapping.device, mapping.inode
            by_file[file] = by_file.get(file, 0) + mapping.length
        assert set(self.windows.mapped_files()) == set(by_file)
        assert all(self.windows.is_mapped(file) for file in by_file)
        largest = self.windows.largest_files(100)
        assert {(use.device, use.inode): use.mapped_bytes for use in largest} == by_file
        assert [use.mapped_bytes for use in largest] == sorted(by_file.values(), reverse=True)
        assert sum(use.mappings for use in largest) == len(mappings)

    def teardown(self) -> None:
        for guest in list(self.live):
            self.kill(guest)
        assert (self.windows.mappings, self.windows.mapped, self.windows.files, len(self.windows)) == (0, 0, 0, 0)


TestAgainstNaiveModel = AgainstNaiveModel.TestCase
TestAgainstNaiveModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, errno.EINVAL), (-CHUNK, errno.EINVAL), (CHUNK + 4096, errno.EINVAL), (65 * CHUNK, errno.EFBIG)],
)
def test_a_window_that_cannot_be(size: int, error: int) -> None:
    windows = Windows(64 * CHUNK, TOTAL)
    with pytest.raises(Refusal) as caught:
        windows.add(size)
    assert caught.value.errno == error
    assert len(windows) == 0


def test_one_guest_cannot_give_back_what_another_has() -> None:
    windows = Windows(64 * CHUNK, TOTAL)
    red, blue = windows.add(4 * CHUNK), windows.add(4 * CHUNK)
    windows.claim(red, 1, 2, 0, CHUNK, 0, True)
    with pytest.raises(Refusal):
        windows.release(blue, 0, CHUNK)
    assert windows.mapped == CHUNK


def test_the_largest_window_full_of_one_file_takes_no_time() -> None:
    """Seconds where each mapping looked at all others; it is some hundredths."""
    begun = time.monotonic()
    windows = Windows(64 << 30, 1 << 40)
    red, blue = windows.add(64 << 30), windows.add(64 << 30)
    for window in red, blue:
        for offset in range(0, window.size, CHUNK):
            windows.claim(window, 1, 2, offset, CHUNK, None, False)
    with pytest.raises(Refusal, match="no room"):
        windows.claim(red, 1, 3, 0, CHUNK, None, False)
    windows.release(red, 5 * CHUNK, CHUNK)
    assert windows.claim(red, 1, 3, 0, CHUNK, None, False).moffset == 5 * CHUNK
    assert windows.beyond((1, 2), (64 << 30) - CHUNK) == {red.number, blue.number}
    windows.remove(red)
    assert windows.beyond((1, 2), 0) == {blue.number}
    assert time.monotonic() - begun < 20
