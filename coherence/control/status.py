"""coherencectl status: the report for people."""

from __future__ import annotations

from coherence.control.client import Report
from coherence.control.dax import in_words
from coherence.messages import Watching
from coherence.table import TRUST_NOTHING


def render(report: Report) -> str:
    """The report for people."""
    status = report.status
    missing = ", ".join(map(str, status.missing))
    trust = "trusted" if status.trusted else f"not trusted, waiting for the backends with pid {missing}"
    lines = [
        f"table     {status.table}, {status.slots} slots, {trust}",
        f"domain    {status.domain}",
        f"daemon    pid {status.pid}, up {status.seconds:.0f} s",
        f"sequence  {status.sequence}, {status.bumps_per_second:.0f} bumps/s",
        f"floor     {'trust nothing' if status.floor == TRUST_NOTHING else status.floor}, "
        f"raised {status.floor_raises} times, distrusted {status.distrusts} times",
        f"roots     {status.roots}",
        f"watch     {watching(status.watch)}",
        f"DAX       {in_words(status.dax)}",
        f"backends  {len(report.backends)}",
    ]
    for backend in report.backends:
        counters = backend.counters
        told = "no answer" if counters is None else ", ".join(f"{k} {v}" for k, v in counters.items())
        lines.append(
            f"  {backend.guest}: pid {backend.pid}, cache {backend.cache}, "
            f"root {backend.device}:{backend.inode}, up {backend.seconds:.0f} s{', ' if told else ''}{told}"
        )
    return "\n".join(lines)


def watching(watch: Watching) -> str:
    """The host watch for people."""
    told = f"{watch.kind}, {of_limit(watch.watches, watch.limit)} watches"
    if watch.refused:
        told += f", {watch.refused} refused"
    if watch.overflows:
        told += f", {watch.overflows} overflows"
    return f"{told}, {watch.events} changes: {watch.bumped} bumped, {watch.own} of backends"


def of_limit(watches: int, limit: int) -> str:
    """How many watches, and how many there can be at most where there is such a limit."""
    return f"{watches} of {limit}" if limit else str(watches)
