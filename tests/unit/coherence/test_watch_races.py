"""Changes by guests and by the host in every order, with the daemon looking in between: none is ever lost.

Guests and host are programs of single steps, and chance decides which of them goes on whenever the daemon reads
events, asks for a lock, or asks for an origin. A host change must be followed by a bump of its slot, and so must
be every copy that was fetched before it: the slot ends up above the sequence of that moment.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from coherent_vfs.coherence.daemon.watch.attribution import Attribution, Member
from tests.unit.coherence.watch_world import Backend, FakeLeases, World

ROUNDS = 4000

Program = Iterator[None]
Answer = TypeVar("Answer")


class Schedule:
    """Runs programs a step at a time, by chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.programs: list[Program] = []

    def step(self) -> None:
        """Perhaps let some of them go on."""
        while self.programs and self._chance.random() < 0.5:
            program = self._chance.choice(self.programs)
            if next(program, StopIteration) is StopIteration:
                self.programs.remove(program)


class Race:
    """Two files in a watched directory, and who changes them."""

    def __init__(self, world: World, backends: list[Backend], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.backends = backends
        self.chance = random.Random(seed)
        self.schedule = Schedule(self.chance)
        self.paths = [world.directory / name for name in ("a", "b")]
        self.fds = []
        for path in self.paths:
            path.touch()
            self.fds.append(os.open(path, os.O_WRONLY))
        self.slots = [world.inode(path) for path in self.paths]
        world.settle()
        leases = world.leases
        monkeypatch.setattr(leases, "locked", lambda slot: self._and_then(FakeLeases.locked(leases, slot)))
        monkeypatch.setattr(leases, "origin", lambda slot: self._and_then(FakeLeases.origin(leases, slot)))
        read = world.watch._read
        monkeypatch.setattr(world.watch, "_read", lambda: self._and_then(read()))
        read_count = Member.read_count
        monkeypatch.setattr(Member, "read_count", lambda member, batch: read_count(member, self._and_then(batch)))

    def _and_then(self, answer: Answer) -> Answer:
        self.schedule.step()
        return answer

    def guest(self, backend: Backend, number: int) -> Program:
        """One change of a file by a guest; its lock keeps other guests away."""
        slot, locks = self.slots[number], self.world.leases.locks
        while slot in locks:
            yield
        locks.add(slot)
        yield
        os.pwrite(self.fds[number], b"g", 0)
        yield
        backend.mark(slot)
        yield
        backend.bump(slot)
        yield
        locks.discard(slot)

    def host(self, number: int, due: list[tuple[int, int]]) -> Program:
        """One change on the host."""
        yield
        os.pwrite(self.fds[number], b"h", 0)
        due.append((self.slots[number], self.world.table.sequence))

    def round(self) -> list[int]:
        """Some changes at once; returns the slots that were not bumped after the last change on the host."""
        due: list[tuple[int, int]] = []
        programs = self.schedule.programs
        looks = self.world.watch.process, self.world.watch.first[1]
        for _ in range(self.chance.randrange(1, 4)):
            programs.append(self.guest(self.chance.choice(self.backends), self.chance.randrange(2)))
        for _ in range(self.chance.randrange(3)):
            programs.append(self.host(self.chance.randrange(2), due))
        while programs:
            self.schedule.step()
            if self.chance.random() < 0.5:
                self.chance.choice(looks)()
        self.world.settle()
        return [slot for slot, sequence in due if self.world.table.slot(slot) <= sequence]


@pytest.fixture
def race(world: World, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Race]]:
    other = Backend(world, 2, 6, "blue")
    assert other.ask(world.directory)
    races: list[Race] = []

    def make(seed: int) -> Race:
        races.append(Race(world, [backend, other], seed, monkeypatch))
        return races[-1]

    yield make
    other.close()
    for fd in races[0].fds:
        os.close(fd)


@pytest.mark.parametrize("seed", range(4))
def test_no_host_change_is_lost(race: Callable[[int], Race], world: World, seed: int) -> None:
    racing = race(seed)
    for number in range(ROUNDS):
        assert racing.round() == [], f"round {number}"
    counts = world.domain.counts
    assert counts.own > ROUNDS / 2, "what is proved is often enough"
    assert counts.bumped > 0


def naive(self: Attribution, slot: int, position: int, batch: int) -> Member | None:
    """Takes every event on a slot that a backend changed last for that backend's."""
    origin = self._leases.origin(slot)
    return None if origin is None else self._members.get(origin[0])


def off_by_one(self: Attribution, slot: int, position: int, batch: int) -> Member | None:
    """Takes an event after the origin's own marker for one before it."""
    origin = self._leases.origin(slot)
    if origin is None:
        return None
    member = self._members[origin[0]]
    return member if member.markers_before(position) + member.offset(batch, batch) <= origin[1] else None


@pytest.mark.parametrize("wrong", [naive, off_by_one])
def test_a_wrong_proof_is_caught(
    race: Callable[[int], Race], wrong: Callable[..., Member | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attribution, "changer", wrong)
    racing = race(0)
    assert any(racing.round() for _ in range(ROUNDS))
