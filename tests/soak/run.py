"""A soak test from start to end."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak import audit
from tests.soak.domain import Domain

POLL_SECONDS = 0.1
AWAY_SECONDS = 0.7
"""That what was killed is away, at most."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        guests: how many, each with a window of 8 chunks.
        seconds: how long.
        seed: decides the changes of each guest; with kills, when things happen decides, too.
        kill_every: mean seconds between two kills; 0: none.
        audit_every: seconds between two audits.
    """

    guests: int = 8
    seconds: float = 60.0
    seed: int = 1
    kill_every: float = 3.0
    audit_every: float = 5.0


@dataclass
class Report:
    """What a run did.

    Attributes:
        seconds: how long guests were busy.
        audits: how often everything was found to agree.
        kills: kill -9, by what.
        bus_errors: guests that died of SIGBUS after a kill that explains it.
        counts: what guests have told that they did; what a guest did before it was killed, nobody tells.
    """

    seconds: float = 0.0
    audits: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    bus_errors: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"time        {self.seconds:.0f} s, {self.audits} audits",
                f"kills       {_listed(self.kills)}",
                f"bus errors  {self.bus_errors}, each after a kill",
                f"guests      {_listed(self.counts)}",
            ]
        )


def soak(settings: Settings, say: Callable[[str], None] = lambda _: None) -> Report:
    """Run a soak test.

    Args:
        settings: what to do.
        say: gets a line of progress at each audit.

    Raises:
        Failed: something did not hold.
    """
    # On a disk, as what is shared is.
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/var/tmp"))
    report = Report()
    try:
        with Domain(folder, settings.guests, str(settings.seed)) as domain:
            try:
                _work(settings, domain, report, say)
                audit.end(domain)
                _count(domain, report)
            except BaseException:
                say(domain.logs()[-6000:])
                raise
    finally:
        shutil.rmtree(folder)
    return report


def _work(settings: Settings, domain: Domain, report: Report, say: Callable[[str], None]) -> None:
    rng = random.Random(f"{settings.seed}/kills")
    audit.all_at_work(domain)
    start = time.monotonic()
    next_audit, next_kill = start + settings.audit_every, start + _until_kill(settings, rng)
    while (now := time.monotonic()) < start + settings.seconds:
        for member in domain.members:
            member.died()
        if now >= next_audit:
            audit.audit(domain)
            report.audits += 1
            _count(domain, report)
            say(f"{now - start:.0f} s\n{report}")
            next_audit = time.monotonic() + settings.audit_every
        if now >= next_kill:
            report.kills[_kill(domain, rng)] += 1
            next_kill = time.monotonic() + _until_kill(settings, rng)
        time.sleep(POLL_SECONDS)
    report.seconds = time.monotonic() - start


def _until_kill(settings: Settings, rng: random.Random) -> float:
    return settings.kill_every * rng.uniform(0.5, 1.5) if settings.kill_every else settings.seconds


def _kill(domain: Domain, rng: random.Random) -> str:
    """Kill something, and start it again a moment later; what it was."""
    member = rng.choice(domain.members)
    what = rng.choice(("guest", "guest", "backend", "backend", "daemon", "backend and daemon"))
    if "guest" in what:
        member.kill_guest()
    if "backend" in what:
        member.kill_backend()
    if "daemon" in what:
        domain.kill_daemon()
    time.sleep(rng.uniform(0, AWAY_SECONDS))
    if "daemon" in what:
        domain.start_daemon()
    if "backend" in what:
        member.start_backend()
    if "guest" in what:
        member.start_guest()
    return what


def _count(domain: Domain, report: Report) -> None:
    report.counts = sum((member.counts for member in domain.members), Counter())
    report.bus_errors = domain.bus_errors


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
