"""When a stock guest in shared keeps a list, and when lists bring attributes (server.caching.readdir_policy)."""

from __future__ import annotations

import errno
import os

import pytest

from coherent_vfs.server.fuse.protocol import (
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
PROBES, RESTS = 4, 7
FOLDERS = {"d", "e"}
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


def listed(guest: RawGuest, nodeid: int) -> tuple[set[str], set[str]]:
    """The files in a directory that come with attributes, and those without; directories always do."""
    fh, _ = open_directory(guest, nodeid)
    entries = read(guest, nodeid, fh)
    assert guest.request(Opcode.RELEASEDIR, nodeid, RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")
    folders = {name for name in entries if name in FOLDERS or name.startswith("folder")}
    assert all(entries[name].nodeid for name in folders)
    with_attributes = {name for name, out in entries.items() if out.nodeid} - folders
    return with_attributes, entries.keys() - folders - with_attributes - {".", ".."}


def brought(guest: RawGuest, nodeid: int) -> bool:
    """Whether a list brings attributes, of all that is in it, but perhaps a probe, or of nothing."""
    with_attributes, without = listed(guest, nodeid)
    assert not with_attributes or len(without) <= 1
    return bool(with_attributes)


def folders(domain: LeaseDomain, count: int) -> list[str]:
    """Make directories of two files each."""
    names = [f"folder{number}" for number in range(count)]
    for name in names:
        (domain.share / name).mkdir()
        for file in ("one", "two"):
            (domain.share / name / file).touch()
    return names


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


def test_one_file_of_a_list_goes_without_attributes_until_it_was_asked_for(domain: LeaseDomain) -> None:
    first, *others = folders(domain, 1 + RESTS + 1)
    with domain.guest() as guest:
        nodeid = find(guest, first)
        with_attributes, without = listed(guest, nodeid)
        assert len(with_attributes) == len(without) == 1
        # Perhaps only after other directories were opened.
        assert brought(guest, 1)
        look_up(guest, nodeid, *without)
        assert [len(listed(guest, find(guest, name))[1]) for name in others] == [0] * RESTS + [1]
        assert brought(guest, nodeid)


def test_where_nobody_asks_for_files_lists_have_names_only(domain: LeaseDomain) -> None:
    *unlooked, last, another, looked = folders(domain, PROBES + 3)
    with domain.guest(lease_max=0.1) as guest:
        assert all(brought(guest, find(guest, name)) for name in unlooked)
        nodeid = find(guest, last)
        assert not brought(guest, nodeid)
        guest.wait(lambda: flags(guest, nodeid) == KEPT)
        # Looked up by name alone, as by git status: that says nothing of lists.
        look_up(guest, find(guest, another), "one")
        assert not brought(guest, nodeid)
        look_up(guest, nodeid, "one")
        assert brought(guest, find(guest, looked))


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
