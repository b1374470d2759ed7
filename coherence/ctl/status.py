"""coherencectl status: the report for people."""

from __future__ import annotations

from collections.abc import Mapping

from coherent_vfs.coherence.ctl.client import Report
from coherent_vfs.coherence.ctl.dax import in_words
from coherent_vfs.coherence.protocol.messages import FloorReason, Watching
from coherent_vfs.coherence.shm.table import TRUST_NOTHING


def render(report: Report) -> str:
    """The report for people."""
    status = report.status
    missing = ", ".join(map(str, status.missing))
    trust = "trusted" if status.trusted else f"not trusted, waiting for the backends with pid {missing}"
    if status.removed:
        trust += ", but its file was REMOVED: stop the virtual machines, restart coherenced, then start them again"
    lines = [
        f"table     {status.table}, {status.slots} slots, {trust}",
        f"domain    {status.domain}",
        f"daemon    pid {status.pid}, up {status.seconds:.0f} s",
        f"sequence  {status.sequence}, {status.bumps_per_second:.0f} bumps/s",
        f"floor     {'trust nothing' if status.floor == TRUST_NOTHING else status.floor}, "
        f"raised {raises(status.floor_raises)}, distrusted {status.distrusts} times",
        f"roots     {status.roots}",
        f"watch     {watching(status.watch)}",
        f"DAX       {in_words(status.dax)}",
        f"backends  {len(report.backends)}",
    ]
    if status.outside:
        pids = ", ".join(map(str, status.outside))
        lines.append(f"outside   pid {pids}: with a table that was removed; restart these virtual machines")
    for backend in report.backends:
        counters = backend.counters
        told = "no answer" if counters is None else ", ".join(f"{k} {v}" for k, v in counters.items() if k != "removed")
        lines.append(
            f"  {backend.guest}: pid {backend.pid}, cache {backend.cache}, "
            f"root {backend.device}:{backend.inode}, up {backend.seconds:.0f} s{', ' if told else ''}{told}"
        )
        if counters and counters.get("removed"):
            lines.append(
                "    its shared directory was removed: make it again, then restart the virtual machine with its backend"
            )
    return "\n".join(lines)


def watching(watch: Watching) -> str:
    """The host watch for people."""
    told = f"{watch.kind}, {of_limit(watch.watches, watch.limit)} watches"
    if watch.refused:
        told += f", {watch.refused} refused"
    if watch.overflows:
        told += f", {watch.overflows} overflows"
    told += f", {watch.events} changes: {watch.bumped} bumped, {watch.own} of backends"
    return f"{told}, {watch.gone} of files that are gone" if watch.gone else told


def raises(floor_raises: Mapping[FloorReason, int]) -> str:
    """How often the floor was raised, and why."""
    why = ", ".join(f"{count} {reason}" for reason, count in floor_raises.items() if count)
    return f"{sum(floor_raises.values())} times{f' ({why})' if why else ''}"


def of_limit(watches: int, limit: int) -> str:
    """How many watches, and how many there can be at most where there is such a limit."""
    return f"{watches} of {limit}" if limit else str(watches)
