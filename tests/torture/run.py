"""A torture test from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable

from tests.torture.actions import Action, Kind
from tests.torture.context import Context, Odds
from tests.torture.domain import Domain, Plan, open_domain
from tests.torture.kills import Killer
from tests.torture.report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        plan: The domain.
        changes: How many.
        seed: Decides the changes of each context. With kills, also when things happen decides.
        odds: How often what happens.
        kill_every: Mean seconds between two kills; 0: none.
        seconds: Time limit; the changes that are not made by then are not made.
    """

    plan: Plan = dataclasses.field(default_factory=Plan)
    changes: int = 1000
    seed: int = 1
    odds: Odds = dataclasses.field(default_factory=Odds)
    kill_every: float = 0.0
    seconds: float = 1200.0


_PROGRESS_SECONDS = 5.0
_ALL_GOES_ON = 60.0
"""Seconds within which some change must be acknowledged."""
_HOPELESS = 1000
"""Wrong observations after which a run ends."""
_TOLD = 20
"""Of which so many are told at once."""
_ASKED = 60
_SURELY_CACHED = 0.75
"""Of the least time of as many questions: no lstat(2) that takes less can have asked."""


def torture(
    settings: Settings, say: Callable[[str], None] = lambda _: None, enough: threading.Event | None = None
) -> Report:
    """Run a torture test.

    Args:
        settings: What to do.
        say: Gets a line of progress now and then.
        enough: Ends the run before its time, once it is set.
    """
    return asyncio.run(_torture(settings, say, enough or threading.Event()))


async def _torture(settings: Settings, say: Callable[[str], None], enough: threading.Event) -> Report:
    report = Report()
    async with open_domain(settings.plan) as domain:
        contexts = [
            Context(number, domain, report, settings.odds, settings.seed) for number in range(settings.plan.contexts)
        ]
        try:
            await _calibrate(domain, contexts)
            start, stop = time.monotonic(), asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(_watch(domain, report, stop, say))
                if settings.kill_every:
                    killer = Killer(domain, contexts, report, settings.kill_every, settings.seed)
                    group.create_task(killer.run(stop))
                await _work(settings, contexts, report, enough)
                report.seconds = time.monotonic() - start
                stop.set()
            report.counters = await domain.counters()
        finally:
            for context in contexts:
                context.close()
    return report


async def _work(settings: Settings, contexts: list[Context], report: Report, enough: threading.Event) -> None:
    end = time.monotonic() + settings.seconds

    def goes_on() -> bool:
        if enough.is_set() or time.monotonic() > end:
            return False
        return report.changes < settings.changes and len(report.stale) < _HOPELESS

    async def strand(context: Context) -> None:
        while goes_on():
            async with context.lock:
                await context.step()
            await asyncio.sleep(0)  # a killer may want the lock

    async with asyncio.TaskGroup() as group:
        for context in contexts:
            group.create_task(strand(context))


async def _calibrate(domain: Domain, contexts: list[Context]) -> None:
    """Find out how long each guest takes at least to ask its backend, while nobody else does."""
    for member in domain.members:
        results = await member.ask(0, [Action(Kind.ASK, contexts[0].root)] * _ASKED)
        quick = _SURELY_CACHED * min(result.microseconds for result in results) / 1e6
        for context in contexts:
            context.quick[member.number] = quick


async def _watch(domain: Domain, report: Report, stop: asyncio.Event, say: Callable[[str], None]) -> None:
    """Tell of the progress, and end a run that does not go on."""
    last, since, told = -1, time.monotonic(), 0
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PROGRESS_SECONDS)
        say(report.progress())
        for text in report.stale[told:_TOLD]:
            say(f"  {text}")
        told = len(report.stale)
        for member in domain.members:
            member.check()
        if report.changes > last:
            last, since = report.changes, time.monotonic()
        elif time.monotonic() - since > _ALL_GOES_ON:
            account = f"{domain.logs()}\n{await domain.state()}"
            raise TimeoutError(f"no change was acknowledged for {_ALL_GOES_ON:.0f} s\n{account}")
