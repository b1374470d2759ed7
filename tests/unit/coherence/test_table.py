"""The version table: layout, operations, and what it refuses."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.compiled import ROOT, load
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import (
    MAX_SLOT_COUNT,
    MIN_SLOT_COUNT,
    ROOT_BITS,
    SLOTS_OFFSET,
    TRUST_NOTHING,
    Table,
)
from tests.unit.coherence.other_kinds import OTHER_KINDS, remove

SIZE = SLOTS_OFFSET + 8 * 1024


@pytest.fixture
def table(paths: DomainPaths) -> Iterator[Table]:
    """A table so small that a test can look at all of it."""
    table = Table.create(paths.name, 1024)
    yield table
    table.close()


def words(path: Path) -> tuple[int, ...]:
    data = path.read_bytes()
    return struct.unpack(f"<{len(data) // 8}Q", data)


def overwrite(path: Path, word: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(8 * word)
        file.write(struct.pack("<Q", value))


def test_the_layout_is_the_documented_one(table: Table, paths: DomainPaths) -> None:
    table.bump(7)
    table.add_root(9)
    file = words(paths.table)
    assert paths.table.read_bytes()[:8] == b"VFSTABL\0"
    assert file[1:3] == (2, 1024)
    assert struct.pack("<2Q", *file[6:8]) == table.domain
    assert (file[8], file[16]) == (table.sequence, table.floor)
    assert (file[24], file[32]) == (1, 1 << 9)
    assert file[512 + 7] == table.slot(7) == table.sequence
    assert len(file) == 512 + 1024


def test_nothing_is_good_under_stamp_0(table: Table) -> None:
    assert not table.valid(5, 0)


def test_a_bump_makes_older_copies_bad_and_no_others(table: Table) -> None:
    stamp = table.stamp()
    assert table.valid(5, stamp)
    assert table.bump(5) == stamp + 1 == table.sequence
    assert not table.valid(5, stamp)
    assert table.valid(5, table.stamp())
    assert table.valid(6, stamp)


def test_a_raised_floor_makes_every_older_copy_bad(table: Table) -> None:
    stamp = table.stamp()
    table.raise_floor()
    assert table.floor == table.sequence == stamp + 1
    assert not table.valid(5, stamp)
    assert table.valid(5, table.stamp())


def test_distrust_lasts_until_the_floor_is_raised(table: Table) -> None:
    table.distrust()
    assert table.floor == TRUST_NOTHING
    table.bump(5)
    assert not table.valid(6, table.stamp())
    stamp = table.stamp()
    table.raise_floor()
    assert not table.valid(6, stamp)
    assert table.valid(6, table.stamp())


def test_a_floor_lifted_while_a_distrust_is_ended_is_not_lost(tmp_path: Path) -> None:
    program = tmp_path / "floor_race"
    source = Path(__file__).with_name("floor_race.c")
    subprocess.run(
        ["cc", "-std=gnu11", "-Wall", "-Werror", f"-I{ROOT}/coherence/shm", "-o", program, source], check=True
    )
    assert subprocess.run([program]).returncode == 0


def test_two_mappings_see_the_same_words(table: Table, paths: DomainPaths) -> None:
    other = Table.open(paths.name)
    table.bump(5)
    assert other.slot(5) == table.slot(5)
    assert other.domain == table.domain
    assert other.name_slot(3, b"name") == table.name_slot(3, b"name")


@pytest.mark.parametrize("slot", [-1, 1024, 1 << 70])
def test_slots_outside_are_an_index_error(table: Table, slot: int) -> None:
    for operation in (table.bump, table.slot, table.is_root, table.add_root):
        with pytest.raises(IndexError):
            operation(slot)
    with pytest.raises(IndexError):
        table.valid(slot, 1)


def test_a_read_only_table_refuses_changes(table: Table, paths: DomainPaths) -> None:
    reader = Table.open(paths.table)
    for operation in (
        lambda: reader.bump(5),
        reader.raise_floor,
        reader.distrust,
        lambda: reader.add_root(5),
    ):
        with pytest.raises(PermissionError, match="read-only"):
            operation()
    assert table.sequence == 1


def test_a_store_through_a_read_only_mapping_kills_the_process_and_changes_nothing(
    table: Table, paths: DomainPaths
) -> None:
    # The compiled bump does not ask whether the table is writable: the hardware does.
    program = (
        "import sys, ctypes; from coherent_vfs.coherence.shm.table import Table\n"
        "table = Table.open(sys.argv[1])\n"
        "line = next(l for l in open('/proc/self/maps') if l.rstrip().endswith(sys.argv[1]))\n"
        "assert line.split()[1] == 'r--s', line\n"
        "ctypes.memset(int(line.split('-')[0], 16) + 4096, 255, 8)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(paths.table)], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == -11
    assert table.slot(0) == 0


def test_a_read_only_descriptor_cannot_be_mapped_writable(table: Table, paths: DomainPaths) -> None:
    fd = os.open(paths.table, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="cannot be mapped"):
            Table.from_fd(fd, writable=True)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE, prot=mmap.PROT_WRITE)
    finally:
        os.close(fd)


def test_a_closed_table_says_so(table: Table) -> None:
    table.close()
    for operation in (lambda: table.bump(5), table.stamp, lambda: table.domain, lambda: table.valid(1, 1)):
        with pytest.raises(ValueError, match="closed"):
            operation()
    table.close()


def test_there_is_no_end_of_roots_and_only_those_to_keep_stay(table: Table) -> None:
    for slot in range(table.slot_count):
        assert not table.is_root(slot)
        table.add_root(slot)
        assert table.is_root(slot)
    assert table.root_bits == set(range(table.slot_count))
    table.keep_roots([3, 64, 1023])
    assert table.root_bits == {3, 64, 1023}
    assert [slot for slot in range(table.slot_count) if table.is_root(slot)] == [3, 64, 1023]


def test_the_epoch_of_roots_tells_of_those_that_come(table: Table) -> None:
    for slot, epoch in ((5, 1), (5, 1), (6, 2)):
        table.add_root(slot)
        assert table.root_epoch == epoch
    table.keep_roots([6])
    assert table.root_epoch == 2
    table.add_root(5)
    assert table.root_epoch == 3


def test_slots_that_share_a_bit_are_all_roots(paths: DomainPaths) -> None:
    Table.create(paths.name, 4 * ROOT_BITS).close()
    table = Table.open(paths.name, writable=True)
    table.add_root(5 + ROOT_BITS)
    assert all(table.is_root(5 + number * ROOT_BITS) for number in range(4))
    assert not table.is_root(6)
    table.keep_roots([5 + 3 * ROOT_BITS])
    assert table.is_root(5 + ROOT_BITS)


def test_the_hash_is_siphash(table: Table, paths: DomainPaths) -> None:
    # The reference implementation's vectors_sip64: key 00..0f, message 00, 01, 02, ... of 8, 15 and 16 bytes.
    for word, value in ((4, 0x0706050403020100), (5, 0x0F0E0D0C0B0A0908)):
        overwrite(paths.table, word, value)
    seeded = Table.open(paths.table)
    first = 0x0706050403020100
    assert seeded.siphash(first, b"") == 0x93F5F5799A932462
    assert seeded.siphash(first, bytes(range(8, 15))) == 0xA129CA6149BE45E5
    assert seeded.siphash(first, bytes(range(8, 16))) == 0x3F2ACC7F57C29BDB
    assert seeded.name_slot(first, bytes(range(8, 15))) == 0xA129CA6149BE45E5 & 1023
    assert seeded.inode_slot(first, 0x0F0E0D0C0B0A0908) == 0x3F2ACC7F57C29BDB & 1023


def test_slots_spread_evenly(table: Table) -> None:
    used = {table.inode_slot(1, inode) for inode in range(1024)}
    assert len(used) > 600  # 1 - 1/e of 1024 is 647


@pytest.mark.parametrize("count", [0, -1, MIN_SLOT_COUNT // 2, MIN_SLOT_COUNT + 1, MAX_SLOT_COUNT * 2])
def test_a_bad_slot_count_is_refused(paths: DomainPaths, count: int) -> None:
    with pytest.raises(UserError, match="use a power of two"):
        Table.create(paths.name, count)
    assert not paths.table.exists()


def test_a_taken_name_is_refused(table: Table, paths: DomainPaths) -> None:
    with pytest.raises(UserError, match="exists already"):
        Table.create(paths.name, 1024)


def test_a_name_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be created"):
        Table.create("/" + "x" * 300)


def test_a_full_file_system_is_refused_and_leaves_nothing(paths: DomainPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left.*free memory"):
        Table.create(paths.name)
    assert not paths.table.exists()


def test_a_missing_table_is_refused(paths: DomainPaths) -> None:
    with pytest.raises(UserError, match="start coherenced"):
        Table.open(paths.name)


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        (0, 0, "not a version table"),
        (0, 12345, "not a version table"),
        (1, 1, "ABI 1, this program needs ABI 2"),
        (2, 0, "a slot count of 0"),
        (2, 1000, "a slot count of 1000"),
        (2, 512, "a slot count of 512"),
        (2, 1 << 25, "a slot count of"),
        (2, 1 << 63, "a slot count of"),
        (2, 2048, "cut off"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    table: Table, paths: DomainPaths, word: int, value: int, says: str
) -> None:
    overwrite(paths.table, word, value)
    with pytest.raises(UserError, match=says):
        Table.open(paths.table)


@pytest.mark.parametrize("size", [0, 7, 8, SLOTS_OFFSET - 1, SLOTS_OFFSET, SIZE - 1])
def test_a_file_that_is_too_short_is_refused(table: Table, paths: DomainPaths, size: int) -> None:
    content = paths.table.read_bytes()
    paths.table.write_bytes(content[:size])
    with pytest.raises(UserError):
        Table.open(paths.table)
    paths.table.write_bytes(content)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", OTHER_KINDS)
def test_what_is_no_regular_file_is_refused(paths: DomainPaths, make: Callable[[Path], None]) -> None:
    make(paths.table)
    try:
        with pytest.raises(UserError, match="not a regular file: name the version table"):
            Table.open(paths.table)
    finally:
        remove(paths.table)


def test_a_pipe_is_refused() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(UserError):
            Table.from_fd(read)
    finally:
        os.close(read)
        os.close(write)


def test_slots_above_the_sequence_are_found(table: Table, paths: DomainPaths) -> None:
    table.bump(5)
    assert table.slots_above_sequence() == 0
    overwrite(paths.table, 512 + 9, 1000)
    assert table.slots_above_sequence() == 1


def test_no_bump_is_lost_between_two_processes(table: Table, paths: DomainPaths) -> None:
    iterations, slots = 1_000_000, 3
    load("table_loop")
    program = (
        "import sys; from bench import table_loop; from coherent_vfs.coherence.shm.table import Table\n"
        "table = Table.open(sys.argv[1], writable=True)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(table_loop.hammer(table, int(sys.argv[2]), int(sys.argv[3])))"
    )
    command = [sys.executable, "-c", program, str(paths.table), str(slots), str(iterations)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    lost = [int(process.communicate()[0]) for process in processes]
    assert lost == [0, 0]
    assert table.sequence == 1 + 2 * iterations
    last = [table.slot(slot) for slot in range(slots)]
    assert max(last) == table.sequence
    assert min(last) > 2
