"""coherencectl top: what each guest does, and what that costs the others, as differences of two statuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from coherent_vfs.coherence.ctl.client import Report, fetch_status
from coherent_vfs.coherence.ctl.columns import aligned
from coherent_vfs.coherence.ctl.status import of_limit
from coherent_vfs.coherence.protocol.messages import Backend


class GuestRow(Struct, frozen=True):
    """One backend. What is not known is None: it did not answer, or is new.

    Args:
        guest, cache, pid: of the backend.
        kind: "aware" of the table or "stock".
        requests_per_second: from the guest.
        changes_per_second: that it made; each makes the others fetch again what they had of it.
        held_per_second: of these, those that had to wait for leases of other guests.
        parked: requests that wait now.
        leases_per_second: given to the guest.
        inodes, handles: that the guest knows now, and has open.
    """

    guest: str
    cache: str
    pid: int
    kind: str | None
    requests_per_second: float | None
    changes_per_second: float | None
    held_per_second: float | None
    parked: int | None
    leases_per_second: float | None
    inodes: int | None
    handles: int | None


class DomainRow(Struct, frozen=True):
    """The domain. Totals count since its daemon started.

    Args:
        table, pid, trusted: of the status.
        bumps_per_second: of slots, by backends and by the daemon.
        host_changes_per_second: made on the host, or possibly so, and bumped by the daemon.
        floor_raises: how often everything that was cached became invalid; new_floor_raises: between the statuses.
        watches, limit, refused, overflows: of the host watch.
    """

    table: str
    pid: int
    trusted: bool
    bumps_per_second: float
    host_changes_per_second: float
    floor_raises: int
    new_floor_raises: int
    watches: int
    limit: int
    refused: int
    overflows: int


class View(Struct, frozen=True):
    """What happened between two statuses.

    Args:
        time: of the second, seconds since 1970.
        seconds: between them.
        domain: the whole.
        guests: who changes most first.
    """

    time: float
    seconds: float
    domain: DomainRow
    guests: list[GuestRow]


def views(socket: Path, interval: float) -> Iterator[View]:
    """A view of the daemon at this socket each `interval` seconds, for ever. UserError when it has gone."""
    old, then = fetch_status(socket), time.monotonic()
    while True:
        time.sleep(interval)
        new, now = fetch_status(socket), time.monotonic()
        yield compare(old, new, now - then)
        old, then = new, now


def compare(old: Report, new: Report, seconds: float) -> View:
    """What happened between two statuses that were so many seconds apart."""
    before, status = old.status, new.status
    raises = sum(status.floor_raises.values())
    domain = DomainRow(
        table=status.table,
        pid=status.pid,
        trusted=status.trusted,
        bumps_per_second=_increase(before.sequence, status.sequence) / seconds,
        host_changes_per_second=_increase(before.watch.bumped, status.watch.bumped) / seconds,
        floor_raises=raises,
        new_floor_raises=_increase(sum(before.floor_raises.values()), raises),
        watches=status.watch.watches,
        limit=status.watch.limit,
        refused=status.watch.refused,
        overflows=status.watch.overflows,
    )
    backends = {(backend.pid, backend.guest): backend for backend in old.backends}
    guests = [_guest(backends.get((backend.pid, backend.guest)), backend, seconds) for backend in new.backends]
    guests.sort(key=lambda row: (-(row.changes_per_second or 0), -(row.requests_per_second or 0), row.guest))
    return View(time.time(), seconds, domain, guests)


def _increase(old: int, new: int) -> int:
    """Of a counter, which starts from 0 when its process is started again."""
    return new - old if new >= old else new


def _guest(old: Backend | None, new: Backend, seconds: float) -> GuestRow:
    counters = new.counters or {}
    before = (old.counters if old is not None else None) or {}

    def rate(name: str) -> float | None:
        if name not in counters or name not in before:
            return None
        return _increase(before[name], counters[name]) / seconds

    aware = counters.get("aware")
    return GuestRow(
        guest=new.guest,
        cache=new.cache,
        pid=new.pid,
        kind=None if aware is None else "aware" if aware else "stock",
        requests_per_second=rate("requests"),
        changes_per_second=rate("changes"),
        held_per_second=rate("held"),
        parked=counters.get("parked"),
        leases_per_second=rate("leases"),
        inodes=counters.get("inodes"),
        handles=counters.get("handles"),
    )


COLUMNS = ("GUEST", "CACHE", "KIND", "REQ/S", "CHANGES/S", "HELD/S", "PARKED", "LEASES/S", "INODES", "HANDLES", "PID")
TEXT_COLUMNS = 3


def lines(view: View, most: int | None = None) -> list[str]:
    """The view for people; at most so many lines."""
    domain = view.domain
    clock = time.strftime("%H:%M:%S", time.localtime(view.time))
    head = [
        f"{clock}  {domain.table}, {'trusted' if domain.trusted else 'not trusted'}, the last {view.seconds:.1f} s",
        f"bumps/s {domain.bumps_per_second:.1f}, host changes/s {domain.host_changes_per_second:.1f}, "
        f"floor raised {domain.floor_raises} times (+{domain.new_floor_raises})",
        f"watches {of_limit(domain.watches, domain.limit)}, {domain.refused} refused, {domain.overflows} overflows",
        "",
    ]
    rows = [COLUMNS, *(_cells(row) for row in view.guests)]
    table = aligned(rows, TEXT_COLUMNS)
    if most is not None and len(head) + len(table) > most:
        shown = max(most - len(head) - 1, 1)
        table[shown:] = [f"and {len(table) - shown} more"]
    return head + table


def _cells(row: GuestRow) -> tuple[str, ...]:
    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    def count(value: int | None) -> str:
        return "-" if value is None else str(value)

    return (
        row.guest,
        row.cache,
        row.kind or "-",
        rate(row.requests_per_second),
        rate(row.changes_per_second),
        rate(row.held_per_second),
        count(row.parked),
        rate(row.leases_per_second),
        count(row.inodes),
        count(row.handles),
        str(row.pid),
    )
