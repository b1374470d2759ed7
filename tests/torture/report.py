"""What a torture test counted and found."""

from __future__ import annotations

import dataclasses
import statistics

HELD_BACK = 0.020
"""Seconds from which on a change counts as held back by a lease."""


@dataclasses.dataclass
class Report:
    """Counts of one run.

    Attributes:
        changes: Changes that were acknowledged.
        unacknowledged: Changes whose guest lost its backend before the answer.
        latencies: Seconds that each acknowledged change took in its guest.
        warmed: Changes whose witness had looked at everything concerned right before.
        checks: Observations that were compared with the host's view.
        slowest_look: Seconds that the slowest observation took, waiting for a processor of the guest included.
        status_checks: Those of them that are one lstat(2).
        cached: How many of those were too quick to have asked the backend.
        orphan_before: Observations that a guest answered from its cache after its backend was killed, while a change
            of what it looked at was waiting.
        orphan_after: The same, after the change was acknowledged.
        races: Changes that a second guest saw before or when they were acknowledged, and a third one was asked about.
        early_races: Those of them that the second guest saw before the changer was told.
        missed_races: Changes that the second guest had stopped to look for, on a crowded machine.
        old_seen: Observations that showed a change that was never acknowledged as not made although it was.
        near: Observations that were right but for some nanoseconds of mtime, as shared does for a moment.
        busy_renames: Looks and changes that Linux refused with ESTALE, as another thread was moving something.
        daemon_kills, backend_kills: kill -9.
        stale: One text for each observation that was wrong.
        late: The same for observations of a guest that had got an answer later than the lease margin shortly before.
            That much is not promised (docs/concepts/leases.md); it says that the machine is too slow for this margin.
        after_slow: Observations, right or wrong, of guests that had got such an answer.
        seconds: From the first change to the last.
        counters: The backends' counters at the end, by guest.
    """

    changes: int = 0
    unacknowledged: int = 0
    latencies: list[float] = dataclasses.field(default_factory=list)
    warmed: int = 0
    checks: int = 0
    slowest_look: float = 0.0
    status_checks: int = 0
    cached: int = 0
    orphan_before: int = 0
    orphan_after: int = 0
    races: int = 0
    early_races: int = 0
    missed_races: int = 0
    old_seen: int = 0
    near: int = 0
    busy_renames: int = 0
    daemon_kills: int = 0
    backend_kills: int = 0
    stale: list[str] = dataclasses.field(default_factory=list)
    late: list[str] = dataclasses.field(default_factory=list)
    after_slow: int = 0
    seconds: float = 0.0
    counters: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def held_back(self) -> int:
        """Acknowledged changes that took long enough to have waited for a lease."""
        return sum(latency > HELD_BACK for latency in self.latencies)

    def counted(self, name: str) -> int:
        """A counter of the backends, added up."""
        return sum(counters.get(name, 0) for counters in self.counters.values())

    def progress(self) -> str:
        """One line."""
        return (
            f"{self.changes} changes, {self.held_back} held back, {self.checks} checks, "
            f"{len(self.stale)} stale, {len(self.late)} late, "
            f"{self.cached} of {self.status_checks} stats cached, "
            f"kills: {self.daemon_kills} daemon {self.backend_kills} backend"
        )

    def __str__(self) -> str:
        lines = [f"changes          {self.changes} acknowledged in {self.seconds:.1f} s, {self.warmed} of them warmed"]
        if self.latencies:
            cuts = statistics.quantiles(self.latencies, n=100) if len(self.latencies) > 1 else [0.0] * 99
            lines.append(
                f"latency          median {1000 * cuts[49]:.1f} ms, 90 % {1000 * cuts[89]:.0f} ms, "
                f"99 % {1000 * cuts[98]:.0f} ms, most {1000 * max(self.latencies):.0f} ms; "
                f"{self.held_back} held back (more than {1000 * HELD_BACK:.0f} ms)"
            )
        lines += [
            f"checks           {self.checks}, of them {self.status_checks} stats, {self.cached} of these from a cache",
            f"                 the slowest took {1000 * self.slowest_look:.0f} ms",
            f"third guest      {self.races} races, in {self.early_races} the second saw it before the acknowledgement; "
            f"{self.missed_races} missed",
            f"kills            {self.daemon_kills} of the daemon, {self.backend_kills} of a backend",
            f"  unacknowledged {self.unacknowledged} changes, seen as not made though made: {self.old_seen}",
            f"  orphans        {self.orphan_before} answers from the cache of a guest without a backend while a change "
            f"waited, {self.orphan_after} after it",
            f"mtime            {self.near} times told a few nanoseconds wrong",
            f"busy renames     {self.busy_renames} times ESTALE",
            f"stale            {len(self.stale)}",
        ]
        lines += [f"  {text}" for text in self.stale[:20]]
        lines.append(f"late             {len(self.late)} of {self.after_slow} checks after a late answer")
        lines += [f"  {text}" for text in self.late[:20]]
        for guest, counters in sorted(self.counters.items()):
            lines.append(f"{guest:16} {', '.join(f'{name} {count}' for name, count in counters.items())}")
        return "\n".join(lines)
