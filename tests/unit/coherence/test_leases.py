"""The lease table: its words, the facade, a model, and two processes at one bucket."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.compiled import ROOT, load
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.leases import BACKEND_MAX, Leases, clock_offset, lease_table_bytes
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import Table

loop = load("lease_loop")

SLOTS = 1024
BUCKETS = SLOTS // 4
SIZE = 4096 + 64 * BUCKETS
SLOT = 5
LOCK, CLOSED, ORIGIN, DATA, LEASE = 0, 1, 2, 3, 4
TICK = 1024
HOUR = 3_600_000_000
LOCK_US = 10_000_000
MANY = 1023


@pytest.fixture
def table(paths: DomainPaths) -> Iterator[Table]:
    """A table so small that a test can look at all of it."""
    table = Table.create(paths.name, SLOTS)
    yield table
    table.close()


def thing(tag: int, slot: int = SLOT) -> int:
    """A hash: its high 14 bits tell things of one bucket apart."""
    return tag << 50 | slot


def words(paths: DomainPaths) -> tuple[int, ...]:
    data = paths.leases.read_bytes()
    return struct.unpack(f"<{len(data) // 8}Q", data)


def bucket(paths: DomainPaths, slot: int = SLOT) -> tuple[int, ...]:
    first = 512 + 8 * (slot % BUCKETS)
    return words(paths)[first : first + 8]


def overwrite(path: Path, word: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(8 * word)
        file.write(struct.pack("<Q", value))


# --- layout ---------------------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one(table: Table, leases: Leases, paths: DomainPaths) -> None:
    leases.next_backend(())
    leases.end_watch_epoch()
    file = words(paths)
    assert paths.leases.read_bytes()[:8] == b"VFLEASE\0"
    assert file[1:3] == (2, BUCKETS)
    assert struct.pack("<2Q", *file[6:8]) == table.domain
    assert (file[8], file[16]) == (1, 2)
    assert 8 * len(file) == lease_table_bytes(SLOTS) == SIZE
    assert not any(file[512:])
    assert BACKEND_MAX == 1022


def test_a_bucket_has_a_lock_closed_an_origin_a_data_word_and_four_leases(
    table: Table, leases: Leases, paths: DomainPaths
) -> None:
    slot = SLOT + 3 * BUCKETS
    before = loop.now()
    assert leases.grant(thing(0x3FFF, slot), BACKEND_MAX, table.stamp(), HOUR)
    loop.set_origin(leases, slot, 9, 77)
    leases.changed(slot, True)
    leases.close_until(slot, HOUR)
    assert leases.lock(slot, 8)
    after = loop.now()
    lock, closed, origin, data, *cells = bucket(paths, slot)
    assert lock & MANY == 8
    assert before + LOCK_US <= lock >> 10 <= after + LOCK_US
    assert before + HOUR <= closed <= after + HOUR
    assert origin == 9 | 3 << 10 | 77 << 12
    assert data == table.sequence + 1
    assert cells[0] & (1 << 24) - 1 == BACKEND_MAX | 0x3FFF << 10
    assert before + HOUR <= (cells[0] >> 24) * TICK < after + HOUR + TICK
    assert cells[1:] == [0, 0, 0]
    assert not any(words(paths)[512 : 512 + 8 * SLOT])


# --- leases ---------------------------------------------------------------------------------------------------


def test_a_lease_holds_others_back_and_not_its_holder(table: Table, leases: Leases) -> None:
    before = loop.now()
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    assert before + HOUR <= leases.leased_until(thing(7), 2) < loop.now() + HOUR + TICK
    assert leases.leased_until(thing(7), 1) == 0


def test_an_end_is_never_rounded_down(table: Table, leases: Leases) -> None:
    now = loop.now()
    for more in (0, 1, 2, TICK - 1, TICK):
        until = (now + HOUR) // TICK * TICK + more
        hash = thing(7, more % 256)
        assert loop.grant_at(leases, hash, 1, table.stamp(), now, until)
        assert until <= loop.leased_until_at(leases, hash, 2, until - 1) < until + TICK


def test_an_end_that_does_not_fit_is_refused(table: Table, leases: Leases) -> None:
    longest = (1 << 50) - TICK
    now = loop.now()
    assert not loop.grant_at(leases, thing(7), 1, table.stamp(), now, longest + 1)
    assert loop.grant_at(leases, thing(7), 1, table.stamp(), now, longest)
    assert loop.leased_until_at(leases, thing(7), 2, now) == longest


def test_a_lease_is_over_at_its_end(table: Table, leases: Leases) -> None:
    now = loop.now()
    assert loop.grant_at(leases, thing(7), 1, table.stamp(), now, now + HOUR)
    end = loop.leased_until_at(leases, thing(7), 2, now)
    assert loop.leased_until_at(leases, thing(7), 2, end - 1) == end
    assert loop.leased_until_at(leases, thing(7), 2, end) == 0


def test_a_lease_is_over_when_its_time_has_passed(table: Table, leases: Leases) -> None:
    begin = time.monotonic()
    assert leases.grant(thing(7), 1, table.stamp(), 2000)
    while leases.leased_until(thing(7), 2):
        assert time.monotonic() < begin + 60
    assert time.monotonic() >= begin + 0.002


def test_a_shorter_lease_does_not_cut_a_longer_one(table: Table, leases: Leases, paths: DomainPaths) -> None:
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    long = leases.leased_until(thing(7), 2)
    assert leases.grant(thing(7), 1, table.stamp(), 1000)
    assert leases.leased_until(thing(7), 2) == long
    assert leases.grant(thing(7), 1, table.stamp(), 2 * HOUR)
    assert leases.leased_until(thing(7), 2) >= long + HOUR
    assert sum(cell != 0 for cell in bucket(paths)[LEASE:]) == 1


def test_the_last_of_several_leases_counts(table: Table, leases: Leases) -> None:
    for holder in (1, 2, 3, 4):
        assert leases.grant(thing(7), holder, table.stamp(), holder * HOUR)
    now = loop.now()
    assert leases.leased_until(thing(7), 1) > now + 3 * HOUR
    assert now + 2 * HOUR < leases.leased_until(thing(7), 4) < now + 3 * HOUR + TICK


def test_a_fifth_holder_shares_a_cell_that_is_then_of_many(table: Table, leases: Leases, paths: DomainPaths) -> None:
    before = loop.now()
    for holder in (1, 2, 3, 4, 5):
        assert leases.grant(thing(7), holder, table.stamp(), holder * HOUR)
    after = loop.now()
    assert [cell & MANY for cell in bucket(paths)[LEASE:]] == [MANY, 2, 3, 4]
    # Whose the shared one is cannot be told any more: it holds all of them back.
    for holder in (1, 2, 3, 4, 5, 6):
        assert before + 5 * HOUR <= leases.leased_until(thing(7), holder) < after + 5 * HOUR + TICK


def test_two_things_in_one_bucket_do_not_hold_each_other_back(table: Table, leases: Leases) -> None:
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    assert leases.leased_until(thing(8), 2) == 0
    assert leases.leased_until(thing(8, SLOT + BUCKETS), 2) == 0
    assert leases.grant(thing(8), 2, table.stamp(), 2 * HOUR)
    now = loop.now()
    assert leases.leased_until(thing(7), 3) < now + HOUR + TICK
    assert leases.leased_until(thing(8), 3) > now + HOUR + TICK


def test_a_full_bucket_gives_no_lease_until_one_is_over(table: Table, leases: Leases) -> None:
    now = loop.now()
    for tag in (1, 2, 3, 4):
        assert loop.grant_at(leases, thing(tag), 1, table.stamp(), now, now + tag * HOUR)
    assert not loop.grant_at(leases, thing(5), 2, table.stamp(), now, now + HOUR)
    assert loop.leased_until_at(leases, thing(5), 3, now) == 0
    # Other slots have other buckets, and what has a lease can be extended.
    assert loop.grant_at(leases, thing(5, SLOT + 1), 2, table.stamp(), now, now + HOUR)
    assert loop.grant_at(leases, thing(4), 2, table.stamp(), now, now + HOUR)
    later = now + HOUR + TICK
    assert loop.grant_at(leases, thing(5), 2, table.stamp(), later, later + HOUR)
    assert loop.leased_until_at(leases, thing(5), 3, later) >= later + HOUR


# --- what speaks against a lease ------------------------------------------------------------------------------


def test_a_bucket_that_another_has_locked_gives_no_lease(table: Table, leases: Leases) -> None:
    assert leases.lock(SLOT, 2)
    assert leases.locked(SLOT)
    assert leases.locked(SLOT + BUCKETS)
    assert not leases.locked(SLOT + 1)
    assert not leases.grant(thing(7), 1, table.stamp(), HOUR)
    assert not leases.grant(thing(7, SLOT + BUCKETS), 1, table.stamp(), HOUR)
    assert leases.grant(thing(7, SLOT + 1), 1, table.stamp(), HOUR)
    assert leases.grant(thing(7), 2, table.stamp(), HOUR)


def test_a_closed_bucket_gives_no_lease_to_anybody_until_then(table: Table, leases: Leases) -> None:
    now = loop.now()
    leases.close_until(SLOT, HOUR)
    leases.close_until(SLOT, 1000)
    for holder in (1, 2):
        # Both clocks may have told the same microsecond.
        assert not loop.grant_at(leases, thing(7), holder, table.stamp(), now + HOUR - 1, now + 2 * HOUR)
    assert loop.leased_until_at(leases, thing(7), 3, now) == 0
    later = loop.now() + HOUR
    assert loop.grant_at(leases, thing(7), 1, table.stamp(), later, later + HOUR)


def test_what_changed_since_the_stamp_gets_no_lease(table: Table, leases: Leases) -> None:
    stamp = table.stamp()
    table.bump(SLOT)
    assert not leases.grant(thing(7), 1, stamp, HOUR)
    assert leases.leased_until(thing(7), 2) == 0
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    # Another slot of the bucket says nothing about this one.
    assert leases.grant(thing(7, SLOT + BUCKETS), 1, stamp, HOUR)


def test_nothing_gets_a_lease_under_a_raised_floor_or_a_distrust(table: Table, leases: Leases) -> None:
    stamp = table.stamp()
    table.raise_floor()
    assert not leases.grant(thing(7), 1, stamp, HOUR)
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    table.distrust()
    assert not leases.grant(thing(8), 1, table.stamp(), HOUR)


# --- the lock -------------------------------------------------------------------------------------------------


def test_a_lock_is_one_backends_until_it_is_over(leases: Leases) -> None:
    now = loop.now()
    mine, before = loop.lock_at(leases, thing(7), 1, now)
    assert before == 0
    for holder in (1, 2):
        assert loop.lock_at(leases, thing(8), holder, now + LOCK_US - 1) == (0, mine)
    taken, before = loop.lock_at(leases, thing(7), 2, now + LOCK_US)
    assert taken
    assert before == mine
    # The first one finds out that it was held for too long.
    assert not loop.unlock(leases, thing(7), mine, 0)
    assert loop.unlock(leases, thing(7), taken, now << 10)
    assert not leases.locked(SLOT)


def test_a_bucket_is_quiet_since_its_last_change(leases: Leases) -> None:
    now = loop.now()
    assert loop.quiet_for(leases, thing(7), now) == now
    mine, _ = loop.lock_at(leases, thing(7), 1, now)
    assert loop.quiet_for(leases, thing(7), now + 5) == 0
    assert loop.unlock(leases, thing(7), mine, (now + 10) << 10)
    assert loop.quiet_for(leases, thing(7), now + 5) == 0
    assert loop.quiet_for(leases, thing(7), now + 30) == 20
    # A dead backend's lock is over some time, and nobody may ever take it away.
    loop.lock_at(leases, thing(7), 2, now + 30)
    assert loop.quiet_for(leases, thing(7), now + 30 + LOCK_US) == 0
    assert loop.quiet_for(leases, thing(7), now + 30 + LOCK_US + 5) == 5


def test_a_change_on_the_host_is_noted_and_leaves_a_lock(leases: Leases, paths: DomainPaths) -> None:
    before = loop.now()
    leases.changed(SLOT, False)
    assert before <= bucket(paths)[LOCK] >> 10 <= loop.now()
    assert bucket(paths)[LOCK] & MANY == 0
    assert bucket(paths)[DATA] == 0
    mine = leases.lock(SLOT, 2)
    leases.changed(SLOT, True)
    assert bucket(paths)[LOCK] == mine


def test_data_that_changed_is_known_until_it_is_told_again(table: Table, leases: Leases) -> None:
    told = table.stamp()
    leases.changed(SLOT, False)
    assert not loop.data_since(leases, SLOT, told)
    leases.changed(SLOT, True)
    table.bump(SLOT)
    assert loop.data_since(leases, SLOT, told)
    assert not loop.data_since(leases, SLOT, table.stamp())
    assert not loop.data_since(leases, SLOT + 1, told)


def test_release_unlocks_what_a_dead_backend_had_locked_and_nobody_elses(leases: Leases, paths: DomainPaths) -> None:
    mine = leases.lock(SLOT, 2)
    leases.release(3)
    assert bucket(paths)[LOCK] == mine
    leases.release(2)
    assert not leases.locked(SLOT)
    assert not loop.unlock(leases, SLOT, mine, 0)
    assert leases.lock(SLOT, 3)


# --- origins, epoch, backend ids ----------------------------------------------------------------------------------


def test_nothing_is_good_of_a_slot_that_is_pinned_until_it_is_unpinned(table: Table, leases: Leases) -> None:
    table.pin(SLOT)
    table.bump(SLOT)
    stamp = table.stamp()
    assert table.pinned() == [SLOT]
    assert not table.valid(SLOT, stamp)
    assert not leases.grant(thing(1), 1, stamp, HOUR)
    assert leases.unpin(SLOT)
    assert table.pinned() == []
    assert not table.valid(SLOT, stamp)
    assert table.valid(SLOT, table.stamp())


def test_a_slot_is_not_unpinned_in_the_middle_of_a_change(table: Table, leases: Leases) -> None:
    table.pin(SLOT)
    assert leases.lock(SLOT, 1)
    assert not leases.unpin(SLOT)
    assert table.pinned() == [SLOT]
    leases.release(1)
    assert leases.unpin(SLOT)


def test_unpin_leaves_what_is_not_pinned(table: Table, leases: Leases) -> None:
    value = table.bump(SLOT)
    assert leases.unpin(SLOT)
    assert table.slot(SLOT) == value


def test_an_origin_is_known_until_another_slot_of_the_bucket_changes(leases: Leases) -> None:
    slots = [SLOT + part * BUCKETS for part in range(4)]
    assert [leases.origin(slot) for slot in slots] == [None] * 4
    for number, changed in enumerate(slots, 1):
        loop.set_origin(leases, changed, BACKEND_MAX, (1 << 52) - number)
        for slot in slots:
            assert leases.origin(slot) == ((BACKEND_MAX, (1 << 52) - number) if slot == changed else None)
    assert leases.origin(SLOT + 1) is None


def test_uncover_begins_a_new_epoch(leases: Leases) -> None:
    epoch = leases.epoch
    leases.end_watch_epoch()
    assert leases.epoch == epoch + 1


def test_markers_are_wanted_or_not(leases: Leases) -> None:
    assert not leases.markers_wanted
    leases.want_markers(True)
    assert leases.markers_wanted
    leases.want_markers(False)
    assert not leases.markers_wanted


def test_a_holders_number_comes_again_as_late_as_possible(table: Table, leases: Leases, paths: DomainPaths) -> None:
    first = [leases.next_backend(()) for _ in range(600)]
    with paths.leases.open("r+b") as file:
        restarted = Leases.from_fd(file.fileno(), table)
    rest = [restarted.next_backend(()) for _ in range(BACKEND_MAX - 600)]
    assert first + rest == list(range(1, BACKEND_MAX + 1))
    assert leases.next_backend(()) == 1


def test_a_holders_number_in_use_is_not_given_out(leases: Leases) -> None:
    assert leases.next_backend({1, 2, 4}) == 3
    assert leases.next_backend({1, 2, 4}) == 5
    everybody = set(range(1, BACKEND_MAX + 1))
    assert leases.next_backend(everybody - {4}) == 4
    with pytest.raises(UserError, match="1022 backends already: end one"):
        leases.next_backend(everybody)


def test_a_spoilt_number_of_the_last_holder_is_no_harm(leases: Leases, paths: DomainPaths) -> None:
    overwrite(paths.leases, 8, (1 << 64) - 1)
    assert 1 <= leases.next_backend(()) <= BACKEND_MAX


# --- clocks ---------------------------------------------------------------------------------------------------

needs_time_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self/ns/time").exists(),
    reason="needs root, and a kernel with time namespaces",
)


def elsewhere(seconds: int, program: str, *arguments: object) -> str:
    """What a Python program prints whose CLOCK_MONOTONIC is so many seconds ahead."""
    command = ["unshare", "--time", "--monotonic", str(seconds), "--fork", sys.executable, "-c", program]
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_time_namespaces
def test_leases_are_given_however_long_the_machine_has_run(paths: DomainPaths) -> None:
    years = 30
    program = (
        "import sys, time; from coherent_vfs.coherence.shm.leases import Leases\n"
        "from coherent_vfs.coherence.shm.table import Table\n"
        "table = Table.create(sys.argv[1], 1024); leases = Leases.create(sys.argv[1] + '.leases', table)\n"
        "assert leases.grant(5, 1, table.stamp(), 1_000_000)\n"
        "print(int(leases.leased_until(5, 2) // 1_000_000 - time.monotonic()))\n"
    )
    assert elsewhere(years * 365 * 86_400, program, paths.name) in ("0", "1")


@needs_time_namespaces
def test_a_process_with_another_clock_is_refused(table: Table, leases: Leases, paths: DomainPaths) -> None:
    """It would see no lease of others, or those that are long over."""
    program = (
        "import sys; from coherent_vfs.coherence.common.errors import OtherClock\n"
        "from coherent_vfs.coherence.shm.leases import Leases\n"
        "from coherent_vfs.coherence.shm.table import Table\n"
        "table = Table.open(sys.argv[1], writable=True)\n"
        "with open(sys.argv[2], 'r+b') as file:\n"
        "    try: Leases.from_fd(file.fileno(), table); print('mapped')\n"
        "    except OtherClock as error: print(error)\n"
    )
    assert elsewhere(0, program, paths.table, paths.leases) == "mapped"
    refusal = "the clock of this process is {} s off that of the lease table: start coherenced and its backends in one"
    for seconds in (1000, -1):
        said = elsewhere(seconds, program, paths.table, paths.leases)
        assert said.startswith(refusal.format(f"{seconds:+}"))


def test_the_clock_of_a_time_namespace(tmp_path: Path) -> None:
    file = tmp_path / "timens_offsets"
    assert clock_offset(str(file)) == 0, "a kernel without time namespaces"
    file.write_text("monotonic           0         0\nboottime            0         0\n")
    assert clock_offset(str(file)) == 0
    file.write_text("monotonic          -2 500000000\nboottime           77         0\n")
    assert clock_offset(str(file)) == -1_500_000_000


# --- what is refused ------------------------------------------------------------------------------------------


def refused(path: Path, table: Table) -> str:
    with path.open("r+b") as file, pytest.raises(UserError) as caught:
        Leases.from_fd(file.fileno(), table)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"), [(0, 0), (0, 12345), (1, 1), (2, 0), (2, 2 * BUCKETS), (2, 1 << 63), (6, 1), (7, 1)]
)
def test_a_header_that_does_not_fit_is_refused(
    table: Table, leases: Leases, paths: DomainPaths, word: int, value: int
) -> None:
    overwrite(paths.leases, word, value)
    assert "restart coherenced" in refused(paths.leases, table)


@pytest.mark.parametrize("size", [0, 7, 24, 4095, 4096, SIZE - 1])
def test_a_file_that_is_too_short_is_refused(table: Table, paths: DomainPaths, tmp_path: Path, size: int) -> None:
    Leases.create(f"/{paths.leases.name}", table).close()
    short = tmp_path / "short"
    short.write_bytes(paths.leases.read_bytes()[:size])
    assert "restart coherenced" in refused(short, table)


def test_the_leases_of_another_table_are_refused(leases: Leases, paths: DomainPaths) -> None:
    others = DomainPaths(f"{paths.name}-other")
    try:
        assert "restart coherenced" in refused(paths.leases, Table.create(others.name, SLOTS))
    finally:
        others.table.unlink(missing_ok=True)


def test_a_taken_name_and_one_that_cannot_be_are_refused(table: Table, leases: Leases, paths: DomainPaths) -> None:
    with pytest.raises(UserError, match="cannot be created"):
        Leases.create(f"/{paths.leases.name}", table)
    with pytest.raises(UserError, match="cannot be created"):
        Leases.create("/" + "x" * 300, table)
    with pytest.raises(TypeError):
        Leases()


def test_a_full_file_system_is_refused_and_leaves_nothing(
    table: Table, paths: DomainPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left.*free memory"):
        Leases.create(f"/{paths.leases.name}", table)
    assert not paths.leases.exists()


def test_a_move_goes_on_with_another_file_or_with_the_old_one(
    table: Table, leases: Leases, paths: DomainPaths, tmp_path: Path
) -> None:
    assert leases.grant(thing(7), 1, table.stamp(), HOUR)
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    with other.open("r+b") as file:
        with pytest.raises(UserError):
            leases.move(file.fileno())
        assert leases.leased_until(thing(7), 2)
        file.write(paths.leases.read_bytes()[:4096])
        file.flush()
        leases.move(file.fileno())
    assert leases.leased_until(thing(7), 2) == 0
    assert leases.lock(SLOT, 1)
    assert bucket(paths)[LOCK] == 0


def slot_operations(leases: Leases) -> list[Callable[[int], object]]:
    return [
        leases.origin,
        leases.locked,
        lambda slot: leases.changed(slot, True),
        lambda slot: leases.lock(slot, 1),
        lambda slot: leases.close_until(slot, 1),
    ]


@pytest.mark.parametrize("slot", [-1, SLOTS, 1 << 70])
def test_slots_outside_are_an_index_error(leases: Leases, paths: DomainPaths, slot: int) -> None:
    for operation in slot_operations(leases):
        with pytest.raises(IndexError):
            operation(slot)
    assert not any(words(paths)[512:])


def test_any_hash_is_in_some_bucket(table: Table, leases: Leases, paths: DomainPaths) -> None:
    assert leases.grant((1 << 64) - 1, 1, table.stamp(), HOUR)
    assert bucket(paths, SLOTS - 1)[LEASE]
    for hash in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            leases.grant(hash, 1, table.stamp(), HOUR)


def test_a_closed_table_says_so(leases: Leases) -> None:
    leases.close()
    operations: list[Callable[[], object]] = [
        lambda: leases.epoch,
        leases.end_watch_epoch,
        lambda: leases.markers_wanted,
        lambda: leases.want_markers(True),
        lambda: leases.next_backend(()),
        lambda: leases.grant(1, 1, 1, 1),
        lambda: leases.leased_until(1, 1),
        *(lambda operation=operation: operation(1) for operation in slot_operations(leases)),
    ]
    for operation in operations:
        with pytest.raises(ValueError, match="closed"):
            operation()
    leases.close()


# --- a model --------------------------------------------------------------------------------------------------

HASHES = (thing(1), thing(2), thing(3, SLOT + BUCKETS), thing(4), thing(5), thing(6, SLOT + 1))


@dataclass
class Model:
    """Leases by thing and holder, as if there were room for all of them."""

    ends: dict[tuple[int, int], int] = field(default_factory=dict)

    def grant(self, hash: int, holder: int, until: int) -> None:
        self.ends[hash, holder] = max(until, self.ends.get((hash, holder), 0))

    def leased_until(self, hash: int, me: int, now: int) -> int:
        ends = [end for (thing, holder), end in self.ends.items() if thing == hash and holder != me and end > now]
        return max(ends, default=0)

    def full(self, now: int) -> bool:
        """Whether the bucket of most things may have no free cell."""
        return sum(hash % BUCKETS == SLOT and end > now for (hash, _), end in self.ends.items()) >= 4

    def crowded(self) -> bool:
        """Whether there were more leases in that bucket than cells, which may be shared then."""
        return sum(hash % BUCKETS == SLOT for hash, _ in self.ends) > 4


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(HASHES), st.integers(1, 7), st.integers(1, 20 * TICK), st.integers(0, 5 * TICK)),
        max_size=40,
    )
)
def test_no_lease_is_ever_missed(
    table: Table, leases: Leases, paths: DomainPaths, steps: list[tuple[int, int, int, int]]
) -> None:
    model, now = Model(), loop.now()
    for word in range(512 + 8 * SLOT, 512 + 8 * (SLOT + 2)):
        overwrite(paths.leases, word, 0)
    for hash, holder, length, pause in steps:
        if loop.grant_at(leases, hash, holder, table.stamp(), now, now + length):
            model.grant(hash, holder, (now + length + TICK - 1) // TICK * TICK)
        else:
            # Who shared a cell and comes again takes one of its own beside it.
            assert model.full(now) or model.crowded()
        now += pause
        for other in HASHES:
            for me in range(1, 9):
                found, least = loop.leased_until_at(leases, other, me, now), model.leased_until(other, me, now)
                assert found == least or (found > least and model.crowded())


# --- races ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("lease_race") / "lease_race"
    source = Path(__file__).with_name("lease_race.c")
    flags = ["-std=gnu11", "-O1", "-Wall", "-Werror", f"-I{ROOT}/coherence/shm"]
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    return program


@pytest.mark.parametrize("scenario", ["change", "stopped-change", "data", "leases", "lock", "note", "release"])
def test_no_schedule_has_a_forbidden_outcome(race: Path, scenario: str) -> None:
    done = subprocess.run([race, scenario], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("scenario", "mistake"),
    [
        ("change", "stamp-after-reply"),
        ("change", "no-second-look"),
        ("change", "no-lock"),
        ("change", "no-lease-check"),
        ("change", "bump-after-unlock"),
        ("stopped-change", "unlock-without-the-clock"),
        ("data", "stamp-after-reply"),
    ],
)
def test_a_mistake_has_a_schedule_that_shows_it(race: Path, scenario: str, mistake: str) -> None:
    done = subprocess.run([race, scenario, mistake], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith(scenario)


@dataclass
class Race:
    """How many leases and changes there were, and whether an older value than the last acknowledged was used."""

    leases: int
    stale: bool
    changes: int


def race_of_processes(paths: DomainPaths, *, second_look: bool, wait: bool, meetings: int) -> Race:
    """One process uses a value while it has a lease, another changes it: see bench/lease_loop.pyi."""
    shared = paths.leases.with_name(f"{paths.leases.name}.shared")
    shared.write_bytes(bytes(mmap.PAGESIZE))
    program = (
        "import json, mmap, sys; from bench import lease_loop; from coherent_vfs.coherence.shm.leases import Leases\n"
        "from coherent_vfs.coherence.shm.table import Table\n"
        "table = Table.open(sys.argv[1], writable=True)\n"
        "with open(sys.argv[2], 'r+b') as file: leases = Leases.from_fd(file.fileno(), table)\n"
        "with open(sys.argv[3], 'r+b') as file: shared = memoryview(mmap.mmap(file.fileno(), 0)).cast('Q')\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    calls = [f"use(leases, shared, {thing(7)}, 1, {second_look}, {meetings})"]
    calls.append(f"change(leases, shared, {thing(7)}, 2, {wait})")
    files = [str(paths.table), str(paths.leases), str(shared)]
    with contextlib.ExitStack() as stack:
        stack.callback(shared.unlink)
        processes = []
        for call in calls:
            command = [sys.executable, "-c", f"{program}print(json.dumps(lease_loop.{call}))", *files]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        (leased, stale), changes = [json.loads(process.communicate()[0]) for process in processes]
    return Race(leased, stale, changes)


def test_nobody_uses_an_old_value_after_the_change_was_acknowledged(
    table: Table, leases: Leases, paths: DomainPaths
) -> None:
    result = race_of_processes(paths, second_look=True, wait=True, meetings=600)
    assert not result.stale
    assert result.leases > 100
    assert result.changes > 600
    assert table.sequence == 1 + result.changes


@pytest.mark.parametrize(("second_look", "wait"), [(False, True), (True, False)])
def test_without_the_second_look_or_the_wait_an_old_value_is_used(
    table: Table, leases: Leases, paths: DomainPaths, second_look: bool, wait: bool
) -> None:
    assert race_of_processes(paths, second_look=second_look, wait=wait, meetings=20_000 if wait else 1 << 60).stale
