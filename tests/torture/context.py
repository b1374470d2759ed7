"""One of the many independent strands of a torture test: a directory in which one change after the other is made."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import random
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.coarse_file_system import WITHOUT_LINKS
from tests.torture.actions import HELD_FILES, Action, Kind, Result
from tests.torture.changes import Change, Generator, Held
from tests.torture.domain import Domain, Member
from tests.torture.port import Lost
from tests.torture.race import choose
from tests.torture.report import Report
from tests.torture.truth import Truth
from tests.torture.world import World

_BUSY_SECONDS = 30.0
"""Longer than some renames that wait for each other, and each for a lease."""
_NEAR_SECONDS = 0.3
"""After this the mtime of a file is told exactly; a directory's not before it changes."""
_TICKS = 0.03
"""Seconds: two ticks of the slowest guest's clock, by which a lease may last longer there, and a little more."""
_FOLLOWED = 5
_WRONG_SECONDS = 3.0
"""How long something wrong is looked at, the first few times that there is something."""
_UNSEEN_SECONDS = 3.0
"""How long after an acknowledgement a guest that looks all the time has surely looked."""
_ROUNDS = 3
"""How often the others look at a change that was never acknowledged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odds:
    """How often what happens in a step.

    Attributes:
        warm: The witnesses look at everything concerned right before the change.
        first_changes: It is guest 0 that makes the change.
        self_check: The guest that made the change looks, too.
        hold: A guest opens another file and keeps it open.
        looks: Observations that one guest makes of one change, at most, besides those of files that it holds open.
        race: With three guests or more, a race as in race.py instead.
    """

    warm: float = 0.25
    first_changes: float = 0.6
    self_check: float = 0.1
    hold: float = 0.15
    looks: int = 10
    race: float = 0.08


class Context:
    """A directory, a random generator, and a thread in each guest's actor.

    Args:
        number: Of the context; decides the random numbers together with the seed.
        domain: The guests.
        report: Where everything is counted.
        odds: How often what happens.
        seed: Of the run.

    Attributes:
        lock: Held during a step; who holds it may use the context's threads.
        quick: For each guest, seconds under which an lstat(2) cannot have asked the backend.
    """

    def __init__(self, number: int, domain: Domain, report: Report, odds: Odds, seed: int) -> None:
        self.number = number
        self.root = f"c{number:02}"
        self.lock = asyncio.Lock()
        self.rng = random.Random(f"{seed}/{number}")
        self.quick: dict[int, float] = {}
        self._domain = domain
        self._report = report
        self._odds = odds
        self._truth = Truth(domain.share)
        self._generator = Generator(self.rng, links=domain.plan.host_fs not in WITHOUT_LINKS)
        self._held: dict[int, dict[int, Held]] = {member.number: {} for member in domain.members}
        self._lives = [member.lives for member in domain.members]
        self._slow: dict[int, tuple[float, float]] = {}
        self._furnish(domain.share / self.root)

    async def step(self) -> None:
        """Make one change and have it looked at, or let one guest open a file."""
        living = [member for member in self._domain.members if member.alive.is_set()]
        if len(living) < 2:
            await asyncio.gather(*(member.alive.wait() for member in self._domain.members[:2]))
            return
        try:
            if self.rng.random() < self._odds.hold:
                await self._hold(self.rng.choice(living))
            changer, *witnesses = self._cast(living)
            if len(witnesses) > 1 and self.rng.random() < self._odds.race:
                await self._race(changer, *witnesses[:2])
            else:
                await self._make(changer, witnesses)
        except Lost:
            pass  # before the change was asked for: nothing has happened

    def world(self) -> World:
        """What there is now."""
        return World(self._domain.share, self.root, self.rng)

    def plan(self, world: World, changer: Member) -> Change:
        """A change that a guest can make now."""
        return self._generator.next(world, self.held_by(changer))

    def held_by(self, member: Member) -> dict[int, Held]:
        """What a guest holds open in this context, by slot."""
        held = self._held[member.number]
        if self._lives[member.number] != member.lives:
            self._lives[member.number] = member.lives
            self._let_go(held)
        return held

    def looks(self, world: World, change: Change, witness: Member) -> list[Action]:
        """Observations of everything that a change concerns, in random order, and of one thing that it does not."""
        rng = self.rng
        names = list(change.concerned)
        looks: list[Action] = []
        for path in rng.sample(names, min(4, len(names))):
            looks.append(Action(Kind.LSTAT, path))
            looks.append(Action(rng.choice([Kind.OPEN, Kind.OPEN, Kind.MAP]), path))
            if rng.random() < 0.2:
                looks.append(Action(rng.choice([Kind.READ_LINK, Kind.GET_XATTR]), path))
        for parent in sorted({path.rpartition("/")[0] for path in names}):
            looks.append(Action(rng.choice([Kind.LIST, Kind.LIST, Kind.LSTAT]), parent))
        if world.things:
            looks.append(Action(Kind.LSTAT, rng.choice(world.things).path))
        looks = rng.sample(looks, min(self._odds.looks, len(looks)))
        slots = [slot for slot, held in self.held_by(witness).items() if held.inode in change.inodes]
        looks += [Action(Kind.READ_HELD, slot=slot) for slot in slots]
        rng.shuffle(looks)
        return looks

    def see(self, looks: Sequence[Action], witness: Member) -> list[Result]:
        """What a guest must see now."""
        held = {slot: held.fd for slot, held in self.held_by(witness).items()}
        return [self._truth.see(look, held) for look in looks]

    async def look(self, member: Member, looks: Sequence[Action], story: str, before: Sequence[Result] = ()) -> None:
        """Let a guest look, and compare what it sees with what is so.

        Args:
            member: The guest.
            looks: What it looks at.
            story: What happened before, for the report.
            before: What was so before that.
        """
        seen = [
            await self._once_more(member, look, result)
            for look, result in zip(looks, await member.ask(self.number, looks), strict=True)
        ]
        now = self.see(looks, member)
        late = self._was_slow(member)
        self._report.after_slow += len(looks) if late else 0
        self._note_slow(member, seen)
        for number, (look, mine, true) in enumerate(zip(looks, seen, now, strict=True)):
            self._count(member, look, mine)
            if mine.same(true):
                continue
            if mine.nearly(true):
                self._report.near += 1
                if stat.S_ISREG(true.mode) and self.rng.random() < 0.05:
                    await asyncio.sleep(_NEAR_SECONDS)
                    (mine,) = await member.ask(self.number, [look])
                    if not mine.same(true):
                        self.complain(member, f"{look}: still {mine.differences(true)}; {story}")
            else:
                old = " (as before the change)" if before and mine.same(before[number]) else ""
                text = (
                    f"{look}: {mine.differences(true)}{old}, {await self._until_right(member, look)}, {late}; {story}"
                )
                self.complain(member, text, late)

    async def _until_right(self, member: Member, look: Action) -> str:
        """How long something stays wrong."""
        if len(self._report.stale) + len(self._report.late) >= _FOLLOWED:
            return "not followed"
        start = time.monotonic()
        while (waited := time.monotonic() - start) < _WRONG_SECONDS:
            (again,) = await member.ask(self.number, [look])
            if again.nearly(self.see([look], member)[0]):
                return f"right after {1000 * waited:.0f} ms"
            await asyncio.sleep(0.002)
        return f"still wrong after {_WRONG_SECONDS} s"

    def complain(self, member: Member, text: str, late: str = "") -> None:
        """Put something wrong into the report; late: why nothing was promised."""
        wrong = self._report.late if late else self._report.stale
        wrong.append(f"guest {member.number}, {self.root}, change {self._report.changes}: {text}")

    def verify(self, change: Change, changer: Member, results: Sequence[Result]) -> None:
        """An acknowledged change must have done what it says, built on what was so before it."""
        for action, result in zip(change.actions, results, strict=True):
            if result.error != change.error:
                self.complain(changer, f"{action}: gave errno {result.error} instead of {change.error}")
                return
        for path, expected in change.becomes.items():
            if (self._domain.share / path).read_bytes() != expected:
                self.complain(changer, f"{change}: {path} does not hold what was written to it")

    def acknowledged(self, results: Sequence[Result]) -> float:
        """Count a change; the seconds that it took."""
        latency = sum(result.microseconds for result in results) / 1e6
        self._report.changes += 1
        self._report.latencies.append(latency)
        return latency

    async def _once_more(self, member: Member, look: Action, result: Result) -> Result:
        """What a guest says that could not look at a directory which another guest has moved.

        Linux gives ESTALE for it while another thread of the same guest moves something between directories: it has
        one lock for both, and does not wait for it (d_splice_alias in fs/dcache.c).
        """
        end = time.monotonic() + _BUSY_SECONDS
        self._report.busy_renames += result.error == errno.ESTALE
        while result.error == errno.ESTALE and time.monotonic() < end:
            await asyncio.sleep(0.01)
            (result,) = await member.ask(self.number, [look])
        return result

    async def _make(self, changer: Member, witnesses: Sequence[Member]) -> None:
        world = self.world()
        change = self.plan(world, changer)
        looks = {witness: self.looks(world, change, witness) for witness in witnesses}
        before = {witness: self.see(looks[witness], witness) for witness in witnesses}
        warm = self.rng.random() < self._odds.warm
        if warm:
            for witness in witnesses:
                await self.look(witness, looks[witness], "nothing happened since it was checked")
        try:
            results = await changer.ask(self.number, change.actions)
        except Lost:
            self._report.unacknowledged += 1
            await self._settle(change, looks, before)
            return
        if any(result.error == errno.ESTALE for result in results):
            self._report.busy_renames += 1
            return
        told = time.monotonic()
        latency = self.acknowledged(results)
        self._report.warmed += warm
        self.verify(change, changer, results)
        story = f"guest {changer.number} had done in {1000 * latency:.1f} ms{', warmed' if warm else ''}: {change}"
        for witness in witnesses:
            order = self.rng.sample(range(len(looks[witness])), len(looks[witness]))
            after = [looks[witness][i] for i in order]
            when = f"{story}; told {1000 * (time.monotonic() - told):.1f} ms before"
            try:
                await self.look(witness, after, when, [before[witness][i] for i in order])
            except Lost:
                continue
        if self.rng.random() < self._odds.self_check:
            await self.look(changer, self.looks(world, change, changer), f"it had done itself: {change}")

    async def _settle(
        self, change: Change, looks: Mapping[Member, Sequence[Action]], before: Mapping[Member, Sequence[Result]]
    ) -> None:
        """A change was never acknowledged. Its backend is dead, so now it is made or not made, for ever; the others
        may see either, but once one of them saw that it is made nobody may see that it is not."""
        made: set[Action] = set()
        for _ in range(_ROUNDS):
            for witness, theirs in looks.items():
                try:
                    seen = await witness.ask(self.number, theirs)
                except Lost:
                    continue
                now = self.see(theirs, witness)
                for look, mine, true, old in zip(theirs, seen, now, before[witness], strict=True):
                    self._report.checks += 1
                    if mine.error == errno.ESTALE:
                        self._report.busy_renames += 1
                    elif mine.same(true) or mine.nearly(true):
                        if not true.same(old):
                            made.add(look)
                    elif look in made:
                        self.complain(witness, f"{look}: {mine.differences(true)} after it was seen; lost: {change}")
                    else:
                        self._report.old_seen += 1
                        if len(change.actions) == 1 and not mine.same(old):
                            self.complain(witness, f"{look}: {mine.differences(true)}, {mine.differences(old)}")

    async def _race(self, changer: Member, second: Member, third: Member) -> None:
        """What the second guest has seen of a change, acknowledged or not, the third one must see from then on."""
        try:
            race = choose(self.world(), self.rng, self._generator.value())
        except LookupError:
            return
        for member in (second, third):
            await self.look(member, [race.look], "nothing happened since it was checked")
        old = self.see([race.look], second)[0].field(race.field)
        watching = asyncio.create_task(second.ask(self.number, [race.watch(old)]))
        await asyncio.sleep(self.rng.uniform(0, 0.003))
        changing = asyncio.create_task(self._timed(changer, race.action))
        try:
            (watched,) = await watching
            ended, early = time.monotonic(), not changing.done()
            (seen,) = await third.ask(self.number, [race.look])
            told, when = await changing
        except Lost:
            self._report.unacknowledged += changing.done() and changing.exception() is not None
            return
        finally:
            await asyncio.gather(watching, changing, return_exceptions=True)
        latency = self.acknowledged([told])
        story = (
            f"guest {changer.number} had done in {1000 * latency:.1f} ms, seen by guest {second.number} as "
            f"{watched.field(race.field)}, errno {watched.error}: {race.action}"
        )
        if told.error:
            self.complain(changer, f"{race.action}: gave errno {told.error}")
        elif watched.field(race.field) == old:
            # The changer of a crowded machine may have come to it only then. What is looked at below must be right.
            self._report.missed_races += 1
            if (unseen := ended - when) > _UNSEEN_SECONDS:
                self.complain(second, f"{race.look}: {race.field.name} was {old} {unseen:.1f} s after it; {story}")
        else:
            self._report.races += 1
            self._report.early_races += early
            if seen.field(race.field) == old:
                late = self._was_slow(third)
                right = await self._until_right(third, race.look)
                self.complain(third, f"{race.look}: {race.field.name} is still {old}, {right}, {late}; {story}", late)
        for member in (second, third):
            await self.look(member, [race.look], story)

    async def _timed(self, member: Member, action: Action) -> tuple[Result, float]:
        """What came of an action, and when that was told."""
        (result,) = await member.ask(self.number, [action])
        return result, time.monotonic()

    def _cast(self, living: Sequence[Member]) -> list[Member]:
        """Who changes, and who looks after that in which order."""
        cast = self.rng.sample(living, len(living))
        if self.rng.random() < self._odds.first_changes:
            cast.sort(key=lambda member: member.number != 0)
        return cast

    async def _hold(self, member: Member) -> None:
        held = self.held_by(member)
        files = self.world().files
        if not files:
            return
        slot, file = self.rng.randrange(HELD_FILES), self.rng.choice(files)
        hold = Action(Kind.HOLD, file.path, slot=slot)
        (result,) = await member.ask(self.number, [hold])
        self._note_slow(member, [result])
        result = await self._once_more(member, hold, result)
        if slot in held:
            os.close(held.pop(slot).fd)
        if result.error:
            self.complain(member, f"cannot open {file.path}, which exists: errno {result.error}")
        else:
            held[slot] = Held(os.open(self._domain.share / file.path, os.O_RDONLY), file.inode)

    def _count(self, member: Member, look: Action, result: Result) -> None:
        self._report.checks += 1
        self._report.slowest_look = max(self._report.slowest_look, result.microseconds / 1e6)
        if look.kind is Kind.LSTAT:
            self._report.status_checks += 1
            self._report.cached += result.microseconds / 1e6 < self.quick.get(member.number, 0)

    def _note_slow(self, member: Member, seen: Sequence[Result]) -> None:
        slowest = max((result.microseconds for result in seen), default=0) / 1e6
        if slowest > self._domain.plan.lease_margin - _TICKS:
            self._slow[member.number] = time.monotonic(), slowest

    def _was_slow(self, member: Member) -> str:
        """Whether a guest got an answer so late that a lease in it may have gone on for too long; for people."""
        when, took = self._slow.get(member.number, (0.0, 0.0))
        ago = time.monotonic() - when
        if ago > 1.2 * self._domain.plan.lease_max:
            return ""
        return f"{ago:.3f} s before it was told something only after {1000 * took:.0f} ms"

    def close(self) -> None:
        """Close what is held open here, too."""
        for held in self._held.values():
            self._let_go(held)

    @staticmethod
    def _let_go(held: dict[int, Held]) -> None:
        for file in held.values():
            os.close(file.fd)
        held.clear()

    @staticmethod
    def _furnish(root: Path) -> None:
        for folder in ("", "a", "b", "b/a"):
            (root / folder).mkdir(parents=True)
            for name in "cde":
                (root / folder / name).write_text(f"{folder}/{name} " * 100)
