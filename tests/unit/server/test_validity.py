"""What a stock guest in shared is told so that its kernel drops what is old (server.caching.validity.Validity.tell)."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.server.fuse.protocol import (
    CREATE_IN,
    FALLOCATE_IN,
    MKNOD_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    Attr,
    FattrFlag,
    Opcode,
    OpenFlag,
)
from tests.coarse_file_system import CannotMount, coarse_file_system, within_a_second
from tests.unit.server.leased import (
    LONGEST,
    LeaseDomain,
    Watcher,
    find,
    get_attributes,
    lease_domain,
    look_up,
    mtime_ns,
    set_attributes,
    write_body,
)
from tests.unit.server.raw_guest import RawGuest
from tests.unit.server.share import attr, entry

MODE = set_attributes(FattrFlag.MODE, mode=0o600)
MTIME_SKEW_MAX = 7
"""Nanoseconds by which an mtime is told wrong at most."""


@pytest.fixture
def two(domain: LeaseDomain) -> Iterator[tuple[RawGuest, RawGuest]]:
    """Two guests that open nothing, with no leases, for which changes would have to wait."""
    with domain.guest(opens=False, lease_max=0.0) as one, domain.guest(opens=False, lease_max=0.0) as other:
        yield one, other


def truth(domain: LeaseDomain, path: str) -> int:
    return (domain.share / path).lstat().st_mtime_ns


def told(guest: RawGuest, nodeid: int) -> int:
    return mtime_ns(get_attributes(guest, nodeid)[1])


def set_time(guest: RawGuest, nodeid: int, nanoseconds: int) -> Attr:
    """Set the modification time; what the reply says."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    body = set_attributes(FattrFlag.MTIME, mtime=seconds, mtimensec=rest)
    error, reply = guest.request(Opcode.SETATTR, nodeid, body)
    assert error == 0
    return attr(reply)


def change_behind(domain: LeaseDomain, other: RawGuest, path: str) -> None:
    """Another guest writes as much as there is, and sets the modification time back."""
    nodeid, before = find(other, path), truth(domain, path)
    assert other.request(Opcode.WRITE, nodeid, write_body(b"CONTENT"))[0] == 0
    set_time(other, nodeid, before)
    assert truth(domain, path) == before


# --- one guest ---------------------------------------------------------------------------------------------------


def test_times_are_exact_where_one_guest_changes_a_file(domain: LeaseDomain) -> None:
    with domain.guest(opens=False) as guest:
        parent = find(guest, "d")
        error, reply = guest.request(
            Opcode.CREATE, parent, CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0) + b"new\0"
        )
        assert error == 0
        out, attributes = entry(reply)
        assert mtime_ns(attributes) == truth(domain, "d/new")
        assert guest.request(Opcode.WRITE, out.nodeid, write_body(b"data"))[0] == 0
        assert told(guest, out.nodeid) == truth(domain, "d/new")
        assert mtime_ns(look_up(guest, parent, "new")[1]) == truth(domain, "d/new")
        assert told(guest, parent) == truth(domain, "d")


def test_times_that_a_program_sets_after_writing_are_exact(domain: LeaseDomain) -> None:
    """As cp -p and tar do: create, write, set the times through the descriptor, stat."""
    with domain.guest(opens=False) as guest:
        error, reply = guest.request(
            Opcode.CREATE, find(guest, "d"), CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0) + b"new\0"
        )
        assert error == 0
        nodeid = entry(reply)[0].nodeid
        for step in range(3):
            assert guest.request(Opcode.WRITE, nodeid, write_body(b"data", step * 4))[0] == 0
            assert mtime_ns(set_time(guest, nodeid, 1_000_000_123 + step)) == 1_000_000_123 + step
            assert told(guest, nodeid) == 1_000_000_123 + step


def test_times_that_a_program_sets_after_filling_a_directory_are_exact(domain: LeaseDomain) -> None:
    """As tar does."""
    with domain.guest(opens=False) as guest:
        nodeid = find(guest, "d")
        body = CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0) + b"new\0"
        assert guest.request(Opcode.CREATE, nodeid, body)[0] == 0
        set_time(guest, nodeid, 1_000_000_123)
        assert told(guest, nodeid) == 1_000_000_123
        assert guest.request(Opcode.UNLINK, nodeid, b"f\0")[0] == 0
        set_time(guest, nodeid, 1_000_000_123)
        assert told(guest, nodeid) == 1_000_000_123


def test_times_are_exact_after_each_change_by_the_guest_itself(domain: LeaseDomain) -> None:
    with domain.guest(opens=False) as guest:
        nodeid = find(guest, "d/f")
        for opcode, body in (
            (Opcode.WRITE, write_body(b"CONTENT")),
            (Opcode.SETATTR, MODE),
            (Opcode.FALLOCATE, FALLOCATE_IN.pack(0, 0, 4096, 0)),
            (Opcode.SETATTR, set_attributes(FattrFlag.SIZE, size=7)),
            (Opcode.SETATTR, MODE),
        ):
            assert guest.request(opcode, nodeid, body)[0] == 0
            assert told(guest, nodeid) == truth(domain, "d/f")


# --- the host ----------------------------------------------------------------------------------------------------


def change_on_the_host(domain: LeaseDomain, path: str) -> None:
    """Write as much as there is, and set the modification time back."""
    file = domain.share / path
    before = truth(domain, path)
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(before, before))


def test_what_changed_while_nobody_watched_is_told_by_another_mtime(domain: LeaseDomain) -> None:
    with domain.guest(opens=False, lease_max=0.0) as guest:
        changed, other = find(guest, "d/f"), find(guest, "d/g")
        assert (told(guest, changed), told(guest, other)) == (truth(domain, "d/f"), truth(domain, "d/g"))
        change_on_the_host(domain, "d/f")
        # As when events were lost, and when coherenced comes back.
        domain.table.raise_floor()
        assert 0 < abs(told(guest, changed) - truth(domain, "d/f")) <= MTIME_SKEW_MAX
        assert told(guest, other) == truth(domain, "d/g"), "its ctime is the same"
        guest.wait(lambda: told(guest, changed) == truth(domain, "d/f"))
        assert guest.request(Opcode.SETATTR, changed, MODE)[0] == 0
        assert told(guest, changed) == truth(domain, "d/f"), "that was told already"


def test_what_changes_where_nobody_can_watch_is_told_by_another_mtime(domain: LeaseDomain) -> None:
    with domain.guest(opens=False, lease_max=0.0) as guest:
        directory = find(guest, "d")
        guest.device.fs.validity.watch_with(Watcher(lambda fd, nodeid: True))
        look_up(guest, directory, "f")
        guest.device.fs.watched(directory, False)
        nodeid = look_up(guest, directory, "f")[0].nodeid
        assert told(guest, nodeid) == truth(domain, "d/f")
        change_on_the_host(domain, "d/f")
        assert 0 < abs(told(guest, nodeid) - truth(domain, "d/f")) <= MTIME_SKEW_MAX
        guest.wait(lambda: told(guest, nodeid) == truth(domain, "d/f"))


# --- two guests --------------------------------------------------------------------------------------------------


def test_a_change_that_cannot_be_told_by_size_and_mtime_is_told_by_another_mtime_for_a_moment(
    domain: LeaseDomain, two: tuple[RawGuest, RawGuest]
) -> None:
    one, other = two
    nodeid = find(one, "d/f")
    assert told(one, nodeid) == truth(domain, "d/f")
    change_behind(domain, other, "d/f")
    valid, attributes = get_attributes(one, nodeid)
    assert valid == 0
    assert attributes.size == 7
    assert 0 < abs(mtime_ns(attributes) - truth(domain, "d/f")) <= MTIME_SKEW_MAX
    # The name tells the same: a guest takes attributes from both.
    assert told(one, nodeid) == mtime_ns(look_up(one, find(one, "d"), "f")[1])
    one.wait(lambda: told(one, nodeid) == truth(domain, "d/f"))


def test_such_a_change_is_told_even_if_another_follows_before_the_moment_is_over(
    domain: LeaseDomain, two: tuple[RawGuest, RawGuest]
) -> None:
    one, other = two
    nodeid = find(one, "d/f")
    seen = [told(one, nodeid)]
    for _ in range(10):
        change_behind(domain, other, "d/f")
        seen.append(told(one, nodeid))
        assert seen[-1] != seen[-2]
    one.wait(lambda: told(one, nodeid) == truth(domain, "d/f"))


def test_no_lease_on_a_time_that_is_told_wrong(domain: LeaseDomain) -> None:
    with domain.guest(opens=False) as one, domain.guest(opens=False, lease_max=0.0) as other:
        nodeid = find(one, "d/f")
        assert get_attributes(one, nodeid)[0] == LONGEST
        pending = other.post(Opcode.WRITE, find(other, "d/f"), write_body(b"CONTENT"))
        before = truth(domain, "d/f")
        other.wait(lambda: pending.done)
        set_time(other, find(other, "d/f"), before)
        one.wait(lambda: get_attributes(one, nodeid)[0] > 0)
        # What may be kept is right.
        assert told(one, nodeid) == truth(domain, "d/f")


def test_own_changes_do_not_hide_those_of_others(domain: LeaseDomain, two: tuple[RawGuest, RawGuest]) -> None:
    """The guest takes the reply to its SETATTR as what its pages belong to."""
    one, other = two
    nodeid = find(one, "d/f")
    before = told(one, nodeid)
    assert other.request(Opcode.WRITE, find(other, "d/f"), write_body(b"CONTENT"))[0] == 0
    error, reply = one.request(Opcode.SETATTR, nodeid, MODE)
    assert error == 0
    replied = mtime_ns(attr(reply))
    assert replied == truth(domain, "d/f") != before
    assert told(one, nodeid) != replied
    one.wait(lambda: told(one, nodeid) == replied)


def test_own_changes_one_after_the_other_do_not_hide_those_of_others(
    domain: LeaseDomain, two: tuple[RawGuest, RawGuest]
) -> None:
    one, other = two
    nodeid = find(one, "d/f")
    told(one, nodeid)
    assert other.request(Opcode.WRITE, find(other, "d/f"), write_body(b"CONTENT"))[0] == 0
    for body in (MODE, set_attributes(FattrFlag.MODE, mode=0o640)):
        error, reply = one.request(Opcode.SETATTR, nodeid, body)
        assert error == 0
    assert told(one, nodeid) != mtime_ns(attr(reply))
    one.wait(lambda: told(one, nodeid) == truth(domain, "d/f"))


def test_changes_of_attributes_alone_are_told_as_they_are(domain: LeaseDomain, two: tuple[RawGuest, RawGuest]) -> None:
    one, other = two
    nodeid, changed = find(one, "d/f"), find(other, "d/f")
    for body in (MODE, set_attributes(FattrFlag.MODE, mode=0o640)):
        told(one, nodeid)
        assert other.request(Opcode.SETATTR, changed, body)[0] == 0
        assert told(one, nodeid) == truth(domain, "d/f")
    for nanoseconds in (5, 1_000_000_007):
        set_time(other, changed, nanoseconds)
        assert told(one, nodeid) == nanoseconds


def test_changes_that_can_be_told_are_told_as_they_are(domain: LeaseDomain, two: tuple[RawGuest, RawGuest]) -> None:
    one, other = two
    nodeid, changed = find(one, "d/f"), find(other, "d/f")
    told(one, nodeid)
    assert other.request(Opcode.WRITE, changed, write_body(b"longer than it was"))[0] == 0
    assert told(one, nodeid) == truth(domain, "d/f")
    set_time(other, changed, 77)
    assert told(one, nodeid) == 77


def test_who_was_never_told_anything_is_told_the_truth(domain: LeaseDomain, two: tuple[RawGuest, RawGuest]) -> None:
    one, other = two
    change_behind(domain, other, "d/f")
    assert told(one, find(one, "d/f")) == truth(domain, "d/f")


def test_a_directory_whose_time_was_set_back(domain: LeaseDomain, two: tuple[RawGuest, RawGuest]) -> None:
    """A guest keeps lists of names as it keeps pages."""
    one, other = two
    nodeid, changed = find(one, "d"), find(other, "d")
    before = told(one, nodeid)
    body = CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0) + b"new\0"
    assert other.request(Opcode.CREATE, changed, body)[0] == 0
    assert other.request(Opcode.UNLINK, changed, b"g\0")[0] == 0
    set_time(other, changed, before)
    assert truth(domain, "d") == before
    assert 0 < abs(told(one, nodeid) - before) <= MTIME_SKEW_MAX
    # The guest compares when it reads the list the next time, which may be much later; at the next change it is over.
    assert other.request(Opcode.UNLINK, changed, b"new\0")[0] == 0
    one.wait(lambda: told(one, nodeid) == truth(domain, "d"))


def read_list(guest: RawGuest, nodeid: int) -> None:
    """Read a directory from its beginning."""
    error, reply = guest.request(Opcode.OPENDIR, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    fh = OPEN_OUT.unpack(reply)[0]
    assert guest.request(Opcode.READDIRPLUS, nodeid, READ_IN.pack(fh, 0, 4000, 0, 0, 0))[0] == 0


def create(guest: RawGuest, parent: int, name: str) -> None:
    body = CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0) + name.encode() + b"\0"
    assert guest.request(Opcode.CREATE, parent, body)[0] == 0


def test_a_list_is_compared_with_the_time_of_when_it_was_read(
    domain: LeaseDomain, two: tuple[RawGuest, RawGuest]
) -> None:
    """Others were told since, without the list being read."""
    one, other = two
    nodeid, changed = find(one, "d"), find(other, "d")
    before = told(one, nodeid)
    read_list(one, nodeid)
    create(other, changed, "new")
    assert told(one, nodeid) == truth(domain, "d") > before
    set_time(other, changed, before)
    assert told(one, nodeid) != before
    # So, too, where it is the guest itself that sets the time.
    assert mtime_ns(set_time(one, nodeid, before)) != before
    assert told(one, nodeid) != before
    # A list that was read since is not old.
    read_list(one, nodeid)
    set_time(other, changed, before + 5)
    assert told(one, nodeid) == before + 5
    set_time(other, changed, before)
    assert told(one, nodeid) == before


def test_changes_of_a_directorys_attributes_alone_leave_its_list(
    domain: LeaseDomain, two: tuple[RawGuest, RawGuest]
) -> None:
    one, other = two
    nodeid, changed = find(one, "d"), find(other, "d")
    told(one, nodeid)
    read_list(one, nodeid)
    assert other.request(Opcode.SETATTR, changed, set_attributes(FattrFlag.MODE, mode=0o700))[0] == 0
    assert told(one, nodeid) == truth(domain, "d")


def test_times_are_exact_where_a_guest_fills_a_directory_that_it_has_listed(domain: LeaseDomain) -> None:
    with domain.guest(opens=False) as guest:
        nodeid = find(guest, "d")
        before = told(guest, nodeid)
        read_list(guest, nodeid)
        for name in ("new", "newer"):
            create(guest, nodeid, name)
            assert told(guest, nodeid) == truth(domain, "d")
            assert mtime_ns(set_time(guest, nodeid, before)) == before
            assert told(guest, nodeid) == before


@pytest.mark.parametrize("name", ["link", "fifo", "device"])
def test_what_has_no_pages_is_told_as_it_is(domain: LeaseDomain, two: tuple[RawGuest, RawGuest], name: str) -> None:
    one, other = two
    if name == "device":
        body = MKNOD_IN.pack(stat.S_IFCHR | 0o600, os.makedev(1, 5), 0) + b"device\0"
        assert other.request(Opcode.MKNOD, 1, body)[0] == 0
    nodeid, changed = find(one, name), find(other, name)
    before = told(one, nodeid)
    set_time(other, changed, before + 5)
    set_time(other, changed, before)
    assert told(one, nodeid) == before
    set_time(one, nodeid, before)
    assert told(one, nodeid) == before


def test_a_guest_that_opens_files_is_told_just_the_same(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=0.0) as one, domain.guest(opens=False, lease_max=0.0) as other:
        nodeid = find(one, "d/f")
        error, reply = one.request(Opcode.OPEN, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
        assert error == 0
        assert OPEN_OUT.unpack(reply)[0]
        before = told(one, nodeid)
        change_behind(domain, other, "d/f")
        assert told(one, nodeid) != before
        one.wait(lambda: told(one, nodeid) == before)


def test_an_aware_guest_keeps_no_data_of_what_is_not_watched(domain: LeaseDomain) -> None:
    """Pages and lists that it kept would be good until the table says otherwise."""
    with domain.guest() as guest:
        fs = guest.device.fs
        fs.prove_aware(domain.table.domain)
        directory, file = find(guest, "d"), find(guest, "d/f")
        fs.validity.watch_with(Watcher(lambda fd, nodeid: True))

        def flags(opcode: Opcode, nodeid: int) -> int:
            error, reply = guest.request(opcode, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
            assert error == 0
            return int(OPEN_OUT.unpack(reply)[1])

        assert flags(Opcode.OPEN, file) & (OpenFlag.DIRECT_IO | OpenFlag.KEEP_CACHE) == OpenFlag.DIRECT_IO
        assert flags(Opcode.OPENDIR, directory) == 0
        fs.watched(directory, True)
        look_up(guest, directory, "f")
        assert flags(Opcode.OPEN, file) & (OpenFlag.DIRECT_IO | OpenFlag.KEEP_CACHE) == OpenFlag.KEEP_CACHE
        assert flags(Opcode.OPENDIR, directory) == OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR


# --- clocks that tell little, or lie -----------------------------------------------------------------------------

DAY = 86_400 * 1_000_000_000
"""Nanoseconds."""
CLOCK_STEPS = pytest.mark.parametrize("step", [0, DAY, -DAY], ids=["right", "set forward", "set back"])


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[LeaseDomain]:
    """A domain on a file system that counts seconds."""
    try:
        with coarse_file_system("ext4-128", tmp_path) as root:
            (root / "d").mkdir()
            (root / "d/f").write_bytes(b"content")
            yield lease_domain(root)
    except CannotMount as error:
        pytest.skip(str(error))


@CLOCK_STEPS
def test_a_change_within_the_second_is_told(coarse: LeaseDomain, step: int) -> None:
    with coarse.guest(opens=False, lease_max=0.0) as one, coarse.guest(opens=False, lease_max=0.0) as other:
        nodeid, changed = find(one, "d/f"), find(other, "d/f")
        one.device.fs.validity.clock_step = step
        within_a_second(0.8)
        assert other.request(Opcode.WRITE, changed, write_body(b"CONTENT"))[0] == 0
        seen = [told(one, nodeid)]
        # Within the step of the kernel's clock, and beyond it.
        for wait in (0.0, 0.0, 0.05):
            time.sleep(wait)
            before = (coarse.share / "d/f").stat()
            assert other.request(Opcode.WRITE, changed, write_body(b"content"))[0] == 0
            after = (coarse.share / "d/f").stat()
            assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
            seen.append(told(one, nodeid))
            assert seen[-1] != seen[-2]
        one.wait(lambda: told(one, nodeid) == truth(coarse, "d/f"))
        # Once the guest has dropped its pages, nothing makes it do so again.
        assert {told(one, nodeid) for _ in range(20)} == {truth(coarse, "d/f")}


@CLOCK_STEPS
def test_a_list_that_changes_within_the_second_is_told(coarse: LeaseDomain, step: int) -> None:
    with coarse.guest(opens=False, lease_max=0.0) as one, coarse.guest(opens=False, lease_max=0.0) as other:
        nodeid, changed = find(one, "d"), find(other, "d")
        one.device.fs.validity.clock_step = step
        within_a_second(0.8)
        body = CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o600, 0, 0)
        assert other.request(Opcode.CREATE, changed, body + b"new\0")[0] == 0
        before = told(one, nodeid)
        time.sleep(0.05)
        assert other.request(Opcode.CREATE, changed, body + b"newer\0")[0] == 0
        after = told(one, nodeid)
        assert after != before
        assert told(one, nodeid) == after


def test_however_often_a_list_changes_within_the_second_its_time_is_not_told_again(coarse: LeaseDomain) -> None:
    with coarse.guest(opens=False, lease_max=0.0) as one, coarse.guest(opens=False, lease_max=0.0) as other:
        nodeid, changed = find(one, "d"), find(other, "d")
        within_a_second(0.8)
        create(other, changed, "new")
        listed = told(one, nodeid)
        read_list(one, nodeid)
        for number in range(2 * MTIME_SKEW_MAX):
            create(other, changed, f"new{number}")
            assert told(one, nodeid) != listed
            set_time(other, changed, DAY + number)
            told(one, nodeid)


def test_a_change_after_an_own_write_that_made_the_file_longer_is_told(coarse: LeaseDomain) -> None:
    with coarse.guest(opens=False, lease_max=0.0) as one, coarse.guest(opens=False, lease_max=0.0) as other:
        nodeid, changed = find(one, "d/f"), find(other, "d/f")
        within_a_second(0.8)
        assert other.request(Opcode.WRITE, changed, write_body(b"CONTENT"))[0] == 0
        before = told(one, nodeid)
        assert one.request(Opcode.WRITE, nodeid, write_body(b" and more", 7))[0] == 0
        # To the guest's kernel size and mtime are what they were.
        assert other.request(Opcode.WRITE, changed, write_body(b"content"))[0] == 0
        assert told(one, nodeid) != before


def test_what_changed_within_the_second_while_nobody_watched_is_told(coarse: LeaseDomain) -> None:
    with coarse.guest(opens=False, lease_max=0.0) as guest:
        nodeid = find(guest, "d/f")
        # The last look was long after the change, and so it seems that the time could not come again.
        guest.device.fs.validity.clock_step = DAY
        within_a_second(0.5)
        (coarse.share / "d/f").write_bytes(b"CONTENT")
        before = told(guest, nodeid)
        (coarse.share / "d/f").write_bytes(b"content")
        coarse.table.raise_floor()
        assert told(guest, nodeid) != before
        guest.wait(lambda: told(guest, nodeid) == truth(coarse, "d/f"))


@CLOCK_STEPS
def test_what_does_not_change_is_kept_whatever_the_clock_says(domain: LeaseDomain, step: int) -> None:
    with domain.guest(opens=False) as guest:
        guest.device.fs.validity.clock_step = step
        nodeid = find(guest, "d/f")
        for _ in range(20):
            valid, attributes = get_attributes(guest, nodeid)
            assert (valid, mtime_ns(attributes)) == (LONGEST, truth(domain, "d/f"))


@CLOCK_STEPS
def test_what_has_just_changed_has_no_lease_whatever_the_clock_says(domain: LeaseDomain, step: int) -> None:
    with domain.guest(opens=False, lease_margin=0.3) as one, domain.guest(opens=False, lease_max=0.0) as other:
        one.device.fs.validity.clock_step = step
        nodeid = find(one, "d/f")
        pending = other.post(Opcode.SETATTR, find(other, "d/f"), MODE)
        other.wait(lambda: pending.done)
        assert get_attributes(one, nodeid)[0] == 0
