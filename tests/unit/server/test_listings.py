"""When a plain guest in shared keeps a directory's list, and when its list brings attributes (server.listings)."""

from __future__ import annotations

import errno
import os

import pytest

from server.fuse.protocol import (
    INIT_IN,
    INIT_OUT,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RELEASE_IN,
    EntryOut,
    InitFlag,
    InitOut,
    Opcode,
    OpenFlag,
)
from tests.unit.server.leased import LeaseDomain, find, look_up
from tests.unit.server.raw_guest import RawGuest
from tests.unit.server.test_leases import entries_of

KEPT = OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR
READ_ANEW = OpenFlag.CACHE_DIR
NEVER_OVER = 3600.0
"""--lease-max, seconds, of a guest whose lists come with leases that last for the whole test."""


def open_directory(guest: RawGuest, nodeid: int) -> tuple[int, OpenFlag]:
    error, reply = guest.request(Opcode.OPENDIR, nodeid, OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    fh, flags, _ = OPEN_OUT.unpack(reply)
    return fh, OpenFlag(flags)


def flags(guest: RawGuest, nodeid: int) -> OpenFlag:
    """How OPENDIR is answered."""
    fh, flags = open_directory(guest, nodeid)
    assert guest.request(Opcode.RELEASEDIR, nodeid, RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")
    return flags


def read(guest: RawGuest, nodeid: int, fh: int) -> dict[str, EntryOut]:
    error, reply = guest.request(Opcode.READDIRPLUS, nodeid, READ_IN.pack(fh, 0, 4000, 0, 0, 0))
    assert error == 0
    return entries_of(reply)


def brought(guest: RawGuest, nodeid: int) -> bool:
    """Whether a list brings attributes, of all that is in it or of nothing."""
    fh, _ = open_directory(guest, nodeid)
    entries = read(guest, nodeid, fh)
    assert guest.request(Opcode.RELEASEDIR, nodeid, RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")
    with_attributes = {name for name, out in entries.items() if out.nodeid}
    assert with_attributes in (set(), entries.keys() - {".", ".."})
    return bool(with_attributes)


@pytest.mark.parametrize(("cache", "always"), [("shared", True), ("auto", False), ("always", False)])
def test_in_shared_the_guest_reads_directories_by_readdirplus_only(
    domain: LeaseDomain, cache: str, always: bool
) -> None:
    with domain.guest(cache=cache) as guest:
        error, reply = guest.request(Opcode.INIT, 0, INIT_IN.pack(7, 41, 131072, 0xFFFFFFFF, 0))
        assert error == 0
        agreed = InitFlag(InitOut._make(INIT_OUT.unpack(reply)).flags)
        assert InitFlag.DO_READDIRPLUS in agreed
        assert (InitFlag.READDIRPLUS_AUTO not in agreed) == always


def test_a_list_is_kept_for_as_long_as_the_leases_that_came_with_it(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=NEVER_OVER) as guest:
        nodeid = find(guest, "d")
        assert brought(guest, nodeid)
        assert flags(guest, nodeid) == KEPT
    with domain.guest(lease_max=0.1) as guest:
        nodeid = find(guest, "d")
        assert brought(guest, nodeid)
        guest.wait(lambda: flags(guest, nodeid) == READ_ANEW)


def test_where_files_are_looked_up_one_by_one_a_list_has_names_only_and_is_kept(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=0.1) as guest:
        nodeid = find(guest, "d")
        look_up(guest, nodeid, "f")
        assert not brought(guest, nodeid)
        guest.wait(lambda: flags(guest, nodeid) == KEPT)
        # A directory apart.
        assert brought(guest, find(guest, "e"))


def test_where_files_are_looked_up_after_a_list_the_next_one_brings_attributes(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid = find(guest, "d")
        look_up(guest, nodeid, "f")
        assert not brought(guest, nodeid)
        look_up(guest, nodeid, "f")
        assert brought(guest, nodeid)
        # Once more by name alone.
        assert brought(guest, find(guest, "e"))
        look_up(guest, nodeid, "f")
        assert not brought(guest, nodeid)


def test_directories_and_what_is_missing_say_nothing(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        assert brought(guest, find(guest, "d"))
        look_up(guest, 1, "d")
        look_up(guest, 1, "e")
        assert guest.request(Opcode.LOOKUP, 1, b"missing\0")[0] in (0, errno.ENOENT)
        assert brought(guest, 1)


def test_without_leases_lists_have_names_only_and_are_kept(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=0.0) as guest:
        nodeid = find(guest, "d")
        assert not brought(guest, nodeid)
        assert flags(guest, nodeid) == KEPT


def test_an_aware_guest_gets_what_it_asks_for_and_keeps_it(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        nodeid = find(guest, "d")
        look_up(guest, nodeid, "f")
        guest.device.fs.prove_aware(domain.table.domain)
        assert brought(guest, nodeid)
        assert flags(guest, nodeid) == KEPT


def test_a_new_session_knows_nothing_of_the_last_one(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=0.1) as guest:
        assert brought(guest, 1)
        guest.wait(lambda: flags(guest, 1) == READ_ANEW)
        guest.initialize()
        assert flags(guest, 1) == KEPT
        assert brought(guest, find(guest, "e"))
        look_up(guest, 1, "link")
        assert not brought(guest, 1)
        guest.device.fs.prove_aware(domain.table.domain)
        guest.initialize()
        assert brought(guest, 1)
