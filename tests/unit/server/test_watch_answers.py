"""What is told of a directory that the host watch has only just been asked for (Validity.awaits_watch())."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from coherent_vfs.server.fuse.protocol import OPEN_IN, OPEN_OUT, READ_IN, Opcode
from tests.unit.server.leased import MS, LeaseDomain, Watcher, attr_valid, entry_valid, find, look_up
from tests.unit.server.raw_guest import RawGuest
from tests.unit.server.share import entry
from tests.unit.server.test_leases import entries_of


class Watch:
    """A host watch that answers as soon as a request is parked, or never.

    Args:
        guest: who asks it.
        answer: whether it can watch; None: it does not answer.

    Attributes:
        asked: node ids.
        parked: how many requests waited at each answer.
    """

    def __init__(self, guest: RawGuest, answer: bool | None) -> None:
        self.asked: list[int] = []
        self.parked: list[int] = []
        self._guest = guest
        self._answer = answer
        guest.device.fs.validity.watch_with(Watcher(self._ask))

    def _ask(self, fd: int, nodeid: int) -> bool:
        self.asked.append(nodeid)
        if self._answer is not None:
            self._guest.loop.call_later(0, lambda: self._tell(nodeid, bool(self._answer)))
        return True

    def _tell(self, nodeid: int, answer: bool) -> None:
        if not self._guest.device.parked:
            self._guest.loop.call_later(0, lambda: self._tell(nodeid, answer))
            return
        self.parked.append(self._guest.device.parked)
        self._guest.device.fs.watched(nodeid, answer)


def reply_to(guest: RawGuest, opcode: Opcode, nodeid: int, body: bytes, meanwhile: Callable[[], object]) -> bytes:
    """The reply to a request that may have to wait for the host watch."""
    pending = guest.post(opcode, nodeid, body)
    meanwhile()
    guest.wait(lambda: pending.done)
    error, reply = pending.outcome
    assert error == 0
    return reply


@pytest.mark.parametrize("aware", [False, True])
def test_the_first_look_up_waits_for_the_answer_and_is_kept(domain: LeaseDomain, aware: bool) -> None:
    with domain.guest() as guest:
        if aware:
            guest.device.fs.prove_aware(domain.table.domain)
        directory = find(guest, "d")
        watch = Watch(guest, True)
        out, _ = entry(reply_to(guest, Opcode.LOOKUP, directory, b"f\0", lambda: None))
        assert (watch.asked, watch.parked) == ([directory], [1])
        assert entry_valid(out) > 0
        assert attr_valid(out) > 0


def test_it_does_not_wait_again(domain: LeaseDomain) -> None:
    with domain.guest() as guest:
        directory = find(guest, "d")
        Watch(guest, True)
        reply_to(guest, Opcode.LOOKUP, directory, b"f\0", lambda: None)
        assert entry_valid(look_up(guest, directory, "f")[0]) > 0


@pytest.mark.parametrize("answer", [False, None])
def test_where_it_is_not_watched_or_there_is_no_answer_nothing_is_kept(
    domain: LeaseDomain, answer: bool | None
) -> None:
    with domain.guest() as guest:
        directory = find(guest, "d")
        guest.device.fs.prove_aware(domain.table.domain)
        Watch(guest, answer)
        served = []
        # Others are served meanwhile.
        out, _ = entry(
            reply_to(guest, Opcode.LOOKUP, directory, b"f\0", lambda: served.append(guest.request(Opcode.STATFS, 1)[0]))
        )
        assert served == [0]
        assert out.entry_valid == (0 if answer is None else 1), "a refused one is as in mode auto"


def test_a_stock_guest_keeps_what_is_not_watched_for_a_second_at_most(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=8.0) as guest:
        fs = guest.device.fs
        watched, refused = find(guest, "d"), find(guest, "e")
        fs.validity.watch_with(Watcher(lambda fd, nodeid: nodeid in (watched, refused)))
        reply_to(guest, Opcode.LOOKUP, watched, b"f\0", lambda: fs.watched(watched, True))
        reply_to(guest, Opcode.LOOKUP, refused, b"h\0", lambda: fs.watched(refused, False))
        guest.wait(lambda: attr_valid(look_up(guest, watched, "f")[0]) > 1_100 * MS)
        for _ in range(2):
            out, _ = look_up(guest, refused, "h")
            assert 0 < entry_valid(out) <= 1000 * MS
            assert 0 < attr_valid(out) <= 1000 * MS


def test_a_list_waits_too(domain: LeaseDomain) -> None:
    # Who opens a directory asks. When it is read only after the answer is not awaited any more: once more.
    assert any(list_waited(domain) for _ in range(20))


def list_waited(domain: LeaseDomain) -> bool:
    with domain.guest() as guest:
        directory = find(guest, "d")
        watch = Watch(guest, True)
        error, reply = guest.request(Opcode.OPENDIR, directory, OPEN_IN.pack(os.O_RDONLY, 0))
        assert error == 0
        body = READ_IN.pack(OPEN_OUT.unpack(reply)[0], 0, 4000, 0, 0, 0)
        entries = entries_of(reply_to(guest, Opcode.READDIRPLUS, directory, body, lambda: None))
        assert watch.asked == [directory]
        # One of the two is a probe (server.caching.readdir_policy).
        assert any(entry_valid(entries[name]) > 0 for name in ("f", "g")) == bool(watch.parked)
        return bool(watch.parked)


def test_where_nothing_can_be_kept_nothing_waits(domain: LeaseDomain) -> None:
    with domain.guest(lease_max=0.0) as guest:
        directory = find(guest, "d")
        watch = Watch(guest, None)
        assert entry_valid(look_up(guest, directory, "f")[0]) == 0
        assert watch.asked == [directory]
