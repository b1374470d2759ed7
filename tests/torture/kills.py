"""kill -9 of the daemon and of backends during a torture test."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import random
from collections.abc import Sequence
from itertools import repeat

from tests.torture.actions import Action, Kind, Result
from tests.torture.changes import Change
from tests.torture.context import Context
from tests.torture.domain import NOT_SERVED, Domain, Member
from tests.torture.report import Report

_BACKENDS = 0.6
"""How often a backend is killed, while all live, and not the daemon."""
_SCENES = 8
"""Contexts in which a guest is looked at after its backend was killed."""
_PATIENCE = 0.5
"""Seconds after which a guest without a backend is taken to have asked it, and so to wait for ever."""


class Killer:
    """Kills the daemon or a backend again and again, and replaces what it killed.

    One guest at most is without a backend at a time, so that the others go on. Such a guest, an orphan, is not ended
    at once: what it can still answer from its cache must be right until its leases are over.

    Args:
        domain: What to kill.
        contexts: Those that work meanwhile.
        report: Where everything is counted.
        every: Mean seconds between two kills.
        seed: Decides what is killed.
    """

    def __init__(self, domain: Domain, contexts: Sequence[Context], report: Report, every: float, seed: int) -> None:
        self._domain = domain
        self._contexts = contexts
        self._report = report
        self._every = every
        self._rng = random.Random(f"{seed}/kills")

    async def run(self, stop: asyncio.Event) -> None:
        """Kill until the event is set; then everything is whole again."""
        replacing: asyncio.Task[None] | None = None
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._every * self._rng.uniform(0.5, 1.5))
                break
            if replacing is not None and replacing.done():
                await replacing
                replacing = None
            if replacing is None and self._rng.random() < _BACKENDS:
                replacing = asyncio.create_task(self._kill_backend(self._rng.choice(self._domain.members)))
            else:
                self._report.daemon_kills += 1
                await self._domain.kill_daemon(away=self._rng.uniform(0, 0.5))
        if replacing is not None:
            await replacing

    async def _kill_backend(self, orphan: Member) -> None:
        async with contextlib.AsyncExitStack() as stack:
            contexts = self._rng.sample(self._contexts, min(_SCENES, len(self._contexts)))
            for context in contexts:
                await stack.enter_async_context(context.lock)
            changers = self._rng.choices(self._others(orphan), k=len(contexts))
            scenes = await asyncio.gather(*map(_prepare, contexts, repeat(orphan), changers))
            self._report.backend_kills += 1
            await asyncio.gather(orphan.kill_backend(), *(scene.play(self._report) for scene in scenes))
        await orphan.replace()

    def _others(self, orphan: Member) -> list[Member]:
        return [member for member in self._domain.members if member is not orphan]


@dataclasses.dataclass
class _Scene:
    """A change of what an orphan had looked at right before its backend was killed.

    Attributes:
        looks: What the orphan looks at: names and their status.
        before: What was so before the change.
    """

    context: Context
    orphan: Member
    changer: Member
    change: Change
    looks: list[Action]
    before: list[Result]

    async def play(self, report: Report) -> None:
        """Make the change while the orphan looks; what it still answers must be right."""
        changing = asyncio.create_task(self.changer.ask(self.context.number, self.change.actions))
        answers = True
        while answers and not changing.done():
            for look, old in zip(self.looks, self.before, strict=True):
                seen = await self._ask(look)
                answers = seen is not None
                if seen is None:
                    break
                report.orphan_before += 1
                if not changing.done() and not seen.nearly(old):
                    after = self.context.see([look], self.orphan)[0]
                    if not seen.nearly(after):
                        self.context.complain(self.orphan, f"orphan, {look}: {seen.differences(old)}; {self.change}")
            await asyncio.sleep(0.002)
        results = await changing
        if any(result.error == errno.ESTALE for result in results):
            return
        self.context.acknowledged(results)
        self.context.verify(self.change, self.changer, results)
        for look in self.looks if answers else ():
            seen = await self._ask(look)
            if seen is None:
                return
            report.orphan_after += 1
            true = self.context.see([look], self.orphan)[0]
            if not seen.nearly(true):
                self.context.complain(self.orphan, f"orphan, {look}: {seen.differences(true)}; {self.change}")

    async def _ask(self, look: Action) -> Result | None:
        """What the orphan says, or None when it does not know by itself."""
        try:
            (seen,) = await asyncio.wait_for(self.orphan.actor.ask(self.context.number, [look]), _PATIENCE)
        except TimeoutError:
            return None
        return None if seen.error in {*NOT_SERVED, errno.ESTALE} else seen


async def _prepare(context: Context, orphan: Member, changer: Member) -> _Scene:
    change = context.plan(context.world(), changer)
    looks = [Action(Kind.LSTAT, path) for path in change.concerned]
    await context.look(orphan, looks, "nothing happened since it was checked")
    return _Scene(context, orphan, changer, change, looks, context.see(looks, orphan))
