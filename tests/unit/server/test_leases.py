"""Which leases a stock guest in shared gets, and for how long (docs/concepts/leases.md)."""

from __future__ import annotations

import errno
import os
import time

from coherent_vfs.server.fuse.protocol import (
    DIRENT,
    ENTRY_OUT,
    ENTRY_OUT_SIZE,
    MKDIR_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    EntryOut,
    FattrFlag,
    Opcode,
    direntplus_size,
)
from tests.unit.server.leased import (
    LONGEST,
    MS,
    LeaseDomain,
    attr_valid,
    change,
    entry_valid,
    find,
    get_attributes,
    look_up,
    set_attributes,
)
from tests.unit.server.raw_guest import RawGuest

MODE = set_attributes(FattrFlag.MODE, mode=0o600)
SLOW_MARGIN, SLOW_LONGEST, SLOW_YOUNG = 0.3, 500 * MS, 1_240 * MS
"""Of a guest for which things are young for longer than a busy machine lets a test wait in its middle: the margin,
seconds; the longest lease; the age before which there is none: a quarter of it is the least lease, which is 10 ms for
the guest and the margin."""


def entries_of(reply: bytes) -> dict[str, EntryOut]:
    """The entries in the answer to a READDIRPLUS."""
    entries, at = {}, 0
    while at < len(reply):
        out = EntryOut._make(ENTRY_OUT.unpack_from(reply, at))
        _, _, length, _ = DIRENT.unpack_from(reply, at + ENTRY_OUT_SIZE)
        name = at + ENTRY_OUT_SIZE + DIRENT.size
        entries[reply[name : name + length].decode()] = out
        at += direntplus_size(length)
    return entries


def plus(guest: RawGuest, nodeid: int) -> dict[str, EntryOut]:
    """All entries of a directory, by READDIRPLUS."""
    error, reply = guest.request(Opcode.OPENDIR, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    fh, _, _ = OPEN_OUT.unpack(reply)
    error, reply = guest.request(Opcode.READDIRPLUS, nodeid, READ_IN.pack(fh, 0, 4000, 0, 0, 0))
    assert error == 0
    return entries_of(reply)


def test_what_is_old_enough_has_the_longest_lease_less_the_margin(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        out, _ = look_up(guest, find(guest, "d"), "f")
        assert entry_valid(out) == attr_valid(out) == LONGEST
        assert get_attributes(guest, out.nodeid)[0] == LONGEST


def test_else_it_is_a_quarter_of_the_age(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=60.0, lease_margin=0.05) as guest:
        nodeid = find(guest, "d/f")
        born = (domain.share / "d/f").stat().st_ctime_ns
        before = time.time_ns()
        valid, _ = get_attributes(guest, nodeid)
        after = time.time_ns()
        assert (before - born) // 4 - 51_000_000 <= valid <= (after - born) // 4 - 49_000_000


def test_the_young_have_none_until_they_are_older(domain: LeaseDomain) -> None:
    with domain.guest(lease_margin=SLOW_MARGIN) as guest:
        path = domain.share / "d/new"
        path.write_bytes(b"")
        parent = find(guest, "d")
        out, _ = look_up(guest, parent, "new")
        assert entry_valid(out) == attr_valid(out) == 0
        guest.wait(lambda: attr_valid(look_up(guest, parent, "new")[0]) > 0)
        assert time.time_ns() - path.stat().st_ctime_ns >= SLOW_YOUNG


def test_no_leases_where_lease_max_is_zero_or_hardly_more_than_the_margin(domain: LeaseDomain) -> None:
    for settings in ({"lease_max": 0.0}, {"lease_max": 0.1, "lease_margin": 0.095}):
        with domain.guest(**settings) as guest:
            out, _ = look_up(guest, find(guest, "d"), "f")
            assert entry_valid(out) == attr_valid(out) == 0
            assert guest.device.fs.validity.given == 0


def test_a_name_that_does_not_exist(domain: LeaseDomain) -> None:
    with domain.guest(lease_margin=SLOW_MARGIN) as guest:
        out, _ = look_up(guest, find(guest, "d"), "missing")
        assert (out.nodeid, entry_valid(out)) == (0, SLOW_LONGEST)
        # In a directory that has just been changed such names are not old enough.
        (domain.share / "e/new").touch()
        assert guest.request(Opcode.LOOKUP, find(guest, "e"), b"missing\0") == (errno.ENOENT, b"")


def test_the_last_change_of_a_name_counts_whatever_the_times_say(domain: LeaseDomain) -> None:
    with domain.guest(lease_margin=SLOW_MARGIN) as guest, domain.guest() as other:
        parent, changed = find(guest, "d"), find(other, "d")
        change(other, Opcode.MKDIR, changed, MKDIR_IN.pack(0o755, 0) + b"new\0")
        change(other, Opcode.RMDIR, changed, b"new\0")
        change(other, Opcode.SETATTR, changed, set_attributes(FattrFlag.MTIME, mtime=1))
        # The directory says that nothing has happened in it since 1970.
        assert guest.request(Opcode.LOOKUP, parent, b"new\0") == (errno.ENOENT, b"")
        assert look_up(guest, parent, "another")[0].nodeid == 0


def test_no_lease_right_after_a_change_by_anybody(domain: LeaseDomain) -> None:
    with domain.guest(lease_margin=SLOW_MARGIN) as guest, domain.guest() as other:
        nodeid = find(guest, "d/f")
        for changer in (guest, other):
            change(changer, Opcode.SETATTR, find(changer, "d/f"), MODE)
            assert get_attributes(guest, nodeid)[0] == 0


def test_a_listing_with_attributes_gives_leases_on_all_of_it(domain: LeaseDomain) -> None:
    with domain.guest(lease_margin=SLOW_MARGIN) as guest, domain.guest() as other:
        (domain.share / "d/young").touch()
        nodeid = find(guest, "d")
        # Now it is known to look at what it lists (server.caching.readdir_policy).
        plus(guest, nodeid)
        look_up(guest, nodeid, "f")
        entries: dict[str, EntryOut] = {}

        def listed() -> bool:
            entries.update(plus(guest, nodeid))
            return attr_valid(entries["f"]) > 0

        # A reply that took more than 10 ms, as on a busy machine, gives none.
        guest.wait(listed)
        assert set(entries) == {".", "..", "f", "g", "young"}
        for name in ("f", "g"):
            assert entry_valid(entries[name]) == attr_valid(entries[name]) == SLOW_LONGEST
        for name in (".", "..", "young"):
            assert entry_valid(entries[name]) == attr_valid(entries[name]) == 0
        pending = other.post(Opcode.SETATTR, find(other, "d/g"), MODE)
        assert not pending.done
        other.wait(lambda: pending.done)


def test_other_modes_give_no_leases_but_heed_them(domain: LeaseDomain) -> None:
    with domain.guest() as guest, domain.guest(cache="auto") as timed, domain.guest(cache="none") as bare:
        for other, seconds, path in ((timed, 1, "d/f"), (bare, 0, "d/g")):
            assert attr_valid(look_up(other, 1, "e")[0]) == seconds * 1_000_000_000
            assert other.device.fs.validity.given == 0
            held = other.device.fs.publisher.held
            assert get_attributes(guest, find(guest, path))[0] == LONGEST
            change(other, Opcode.SETATTR, find(other, path), MODE)
            assert other.device.fs.publisher.held > held
