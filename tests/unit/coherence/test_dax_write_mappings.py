"""Which slots are pinned."""

from __future__ import annotations

import asyncio

from coherent_vfs.coherence.daemon.dax.write_mappings import WriteMappings


class Tables:
    """A version table and its lease table, with slots that are being changed."""

    def __init__(self) -> None:
        self.pins: set[int] = set()
        self.busy: set[int] = set()

    def pin(self, slot: int) -> None:
        self.pins.add(slot)

    def pinned(self) -> list[int]:
        return list(self.pins)

    def unpin(self, slot: int) -> bool:
        if slot not in self.busy:
            self.pins.discard(slot)
        return slot not in self.busy


def test_a_slot_is_pinned_as_long_as_it_is_wanted() -> None:
    tables = Tables()
    pins = WriteMappings(tables, tables)
    pins.want(7, False)
    for _ in range(2):
        pins.want(7, True)
        assert tables.pins == {7}
    pins.want(7, False)
    assert tables.pins == set()


def test_it_is_unpinned_when_nobody_changes_it_any_more() -> None:
    async def run() -> None:
        tables = Tables()
        pins = WriteMappings(tables, tables)
        pins.want(7, True)
        tables.busy = {7}
        pins.want(7, False)
        pins.want(8, True)
        pins.want(8, False)
        assert tables.pins == {7, 8}
        tables.busy.clear()
        while tables.pins:
            await asyncio.sleep(0.001)

    asyncio.run(run())


def test_one_that_is_wanted_again_stays() -> None:
    async def run() -> None:
        tables = Tables()
        pins = WriteMappings(tables, tables)
        pins.want(7, True)
        tables.busy = {7}
        pins.want(7, False)
        pins.want(7, True)
        tables.busy.clear()
        pins.want(8, True)
        pins.want(8, False)
        while 8 in tables.pins:
            await asyncio.sleep(0.001)
        assert tables.pins == {7}

    asyncio.run(run())


def test_what_an_earlier_daemon_has_pinned_is_let_go() -> None:
    tables = Tables()
    tables.pins = {3, 4}
    pins = WriteMappings(tables, tables)
    pins.want(4, True)
    pins.start()
    assert tables.pins == {4}
