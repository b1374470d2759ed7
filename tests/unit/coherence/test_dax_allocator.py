"""The allocator among backends that claim, truncate files, answer late or never, read nothing, die, and come back."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from coherent_vfs.coherence.daemon.dax import truncations
from coherent_vfs.coherence.daemon.dax.allocator import Allocator, FromMember
from coherent_vfs.coherence.daemon.dax.member import Member
from coherent_vfs.coherence.daemon.dax.write_mappings import WriteMappings
from coherent_vfs.coherence.protocol.connection import Connection, Full
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import (
    TRUNCATE_GRANT_SECONDS,
    Claim,
    Claimed,
    Coordinate,
    FromClient,
    Mapping,
    Release,
    Resize,
    Revoke,
    Revoked,
    ToBackend,
    Truncate,
    Truncated,
    TruncateGranted,
    Window,
    Windowed,
)

CHUNKS = 64
BACKENDS = 8
FILES = 3
File = tuple[int, int]
# File, size, and how many truncations had begun by then.
Wanted = tuple[File, int, int]

backends = st.integers(0, BACKENDS - 1)
files = st.integers(0, FILES - 1)
sizes = st.integers(0, 5 * CHUNK)


class Clocked(asyncio.SelectorEventLoop):
    """A loop whose time passes when it is told to."""

    now = 0.0

    def time(self) -> float:
        """Seconds."""
        return self.now

    def do(self, call: Callable[[], None]) -> None:
        """Call within the loop, and do all that is due."""
        failures: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: failures.append(context))
        self.call_soon(call)
        for _ in range(3):
            self.call_soon(self.stop)
            self.run_forever()
        assert not failures, failures


class Slots:
    """The part of a version table and its leases that is about pinned slots."""

    def __init__(self) -> None:
        self.now: set[int] = set()

    def pin(self, slot: int) -> None:
        """As Table.pin."""
        self.now.add(slot)

    def pinned(self) -> list[int]:
        """As Table.pinned."""
        return list(self.now)

    def unpin(self, slot: int) -> bool:
        """As Leases.unpin, when nobody is changing anything."""
        self.now.discard(slot)
        return True


class FakeBackend:
    """A backend as the daemon sees it: a connection that takes messages, and what it should know.

    Attributes:
        mapped: by moffset; what it was granted and has not given back.
        asked: claims and truncations without an answer, by token.
        truncating: truncations that were granted, by token: file, and when.
        pending: Revokes without an answer, by token: file, size, and how many truncations had begun by then.
        answered: the same of those with an answer.
        deaf: whether its socket is full.
        excused: whether the allocator need not wait for it.
        missed: Revokes that it did not read, as in pending: nobody waits for their answers, also when it reads again.
    """

    def __init__(self, world: World, mapped: dict[int, Mapping]) -> None:
        self.world = world
        self.mapped = mapped
        self.asked: dict[int, Claim | Wanted] = {}
        self.truncating: dict[int, tuple[File, float]] = {}
        self.pending: dict[int, Wanted] = {}
        self.answered: set[Wanted] = set()
        self.revoked: set[File] = set()
        self.deaf = False
        self.excused = False
        self.missed: set[Wanted] = set()
        self.dropped = False
        self.coordinate: bool | None = None
        self.token = 0
        self.member: Member | None = None

    def send(self, message: ToBackend) -> None:
        """As Connection.send."""
        if self.deaf:
            if isinstance(message, Revoke):
                # Until it has answered another one it counts as late.
                self.excused = True
                self.missed.add(((message.device, message.inode), message.size, self.world.truncations))
            raise Full("it does not read its messages")
        self.world.check(self, message)

    def drop(self, reason: str) -> None:
        """As Handler's."""
        assert self.deaf, reason
        self.dropped = True


class World(RuleBasedStateMachine):
    """Some backends of one daemon."""

    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.WARNING)
        self.loop = Clocked()
        self.members: dict[int, FakeBackend] = {}
        self.fds = [os.memfd_create(f"f{number}") for number in range(FILES)]
        self.files = [(status.st_dev, status.st_ino) for status in map(os.fstat, self.fds)]
        self.slots = Slots()
        self.truncations = 0
        self.begun_at: dict[int, float] = {}

    @initialize()
    def begin(self) -> None:
        """With something mapped, so that few steps lead to trouble."""
        self.start_daemon()
        for number in range(BACKENDS // 2):
            self.join(number, {})
            for file in range(FILES):
                self.claim(number, file, number, None, number == file)

    def start_daemon(self) -> None:
        self.away = 0
        pins = WriteMappings(self.slots, self.slots)
        self.allocator = Allocator(
            CHUNKS * CHUNK, 1 << 40, lambda device, inode: inode % 2, pins, lambda: self.away > 0
        )
        self.loop.do(self.allocator.start)

    def handle(self, backend: FakeBackend, message: FromMember, fds: list[int] | None = None) -> None:
        assert backend.member is not None
        member = backend.member
        self.loop.do(lambda: self.allocator.handle(member, message, fds or []))

    def check(self, backend: FakeBackend, message: ToBackend) -> None:
        """What the allocator says must be right."""
        match message:
            case Claimed():
                claim = backend.asked.pop(message.token)
                assert isinstance(claim, Claim)
                if not message.error:
                    file = claim.device, claim.inode
                    others = (other for other in self.members.values() if other is not backend)
                    truncating = {file for other in others for file, _ in other.truncating.values()}
                    assert file not in truncating, "while it is truncated"
                    granted = Mapping(*file, claim.offset, claim.length, message.moffset, claim.writable)
                    # What is there already may become writable.
                    before = backend.mapped.get(message.moffset)
                    assert before is None or (granted.writable and before == replace(granted, writable=False))
                    backend.mapped[message.moffset] = granted
            case TruncateGranted():
                truncation = backend.asked.pop(message.token)
                assert isinstance(truncation, tuple)
                file, size, begun = truncation
                overdue = self.is_over(self.begun_at[begun], truncations.REVOKE_SECONDS)
                for other in self.members.values():
                    beyond = any(self.reaches(mapping, file, size) for mapping in other.mapped.values())
                    missed = any(m[:2] == (file, size) and m[2] >= begun for m in other.missed)
                    if other is not backend and beyond and not (other.excused or other.deaf or overdue or missed):
                        assert file in other.revoked
                        assert any(a[0] == file and a[1] <= size and a[2] >= begun for a in other.answered)
                backend.truncating[message.token] = file, self.loop.now
            case Revoke():
                file = message.device, message.inode
                backend.pending[message.token] = file, message.size, self.truncations
                backend.revoked.add(file)
            case Resize():
                backend.revoked.discard((message.device, message.inode))
            case Coordinate():
                backend.coordinate = message.truncations
            case Windowed():
                assert (message.error, message.refused) == (0, 0)
            case _:
                raise AssertionError(message)

    @staticmethod
    def reaches(mapping: Mapping, file: File, size: int) -> bool:
        return (mapping.device, mapping.inode) == file and mapping.offset + mapping.length > size

    def join(self, number: int, mapped: dict[int, Mapping]) -> None:
        backend = self.members[number] = FakeBackend(self, mapped)
        connection = cast(Connection[FromClient], backend)

        def register() -> None:
            backend.member = self.allocator.join(f"g{number}", number, connection, backend.drop, True)

        self.loop.do(register)
        told = list(mapped.values())
        half = len(told) // 2
        if half:
            self.handle(backend, Window(CHUNKS * CHUNK, told[:half], True))
        self.handle(backend, Window(CHUNKS * CHUNK, told[half:]))

    def leave(self, number: int) -> dict[int, Mapping]:
        backend = self.members.pop(number)
        assert backend.member is not None
        member = backend.member
        self.loop.do(lambda: self.allocator.leave(member))
        return backend.mapped

    @rule(number=backends)
    def start(self, number: int) -> None:
        if number not in self.members:
            self.join(number, {})

    @rule(number=backends)
    def kill(self, number: int) -> None:
        if number in self.members:
            self.leave(number)

    @rule()
    def restart_the_daemon(self) -> None:
        mapped = {number: self.leave(number) for number in list(self.members)}
        self.nothing_is_left()
        self.start_daemon()
        self.away = len(mapped)
        for number, mappings in mapped.items():
            self.join(number, mappings)
            self.away -= 1
        self.loop.do(self.allocator.sweep)

    @rule(
        number=backends,
        file=files,
        offset=st.integers(0, 4),
        moffset=st.none() | st.integers(0, CHUNKS - 1),
        writable=st.booleans(),
    )
    def claim(self, number: int, file: int, offset: int, moffset: int | None, writable: bool) -> None:
        backend = self.members.get(number)
        if backend is not None and not backend.deaf:
            backend.token += 1
            wanted = None if moffset is None else moffset * CHUNK
            message = Claim(backend.token, *self.files[file], offset * CHUNK, CHUNK, wanted, writable)
            backend.asked[backend.token] = message
            self.handle(backend, message)

    @rule(number=backends, data=st.data())
    def release(self, number: int, data: st.DataObject) -> None:
        backend = self.members.get(number)
        if backend is not None and backend.mapped:
            moffset = data.draw(st.sampled_from(sorted(backend.mapped)))
            length = backend.mapped.pop(moffset).length
            self.handle(backend, Release([(moffset, length), (moffset, length), (1, 1)]))

    @rule(number=backends, file=files, size=sizes)
    def truncate(self, number: int, file: int, size: int) -> None:
        backend = self.members.get(number)
        if backend is not None and not backend.deaf:
            backend.token += 1
            self.truncations += 1
            self.begun_at[self.truncations] = self.loop.now
            backend.asked[backend.token] = self.files[file], size, self.truncations
            self.handle(backend, Truncate(backend.token, size), [self.fds[file]])

    @rule(number=backends)
    def revoke(self, number: int) -> None:
        backend = self.members.get(number)
        if backend is not None and backend.pending:
            while backend.pending:
                token = next(iter(backend.pending))
                backend.answered.add(backend.pending.pop(token))
                self.handle(backend, Revoked(token))
            backend.excused = False

    @rule(number=backends)
    def end_truncations(self, number: int) -> None:
        backend = self.members.get(number)
        if backend is not None:
            # Those that were not answered, too: the request was interrupted.
            tokens = [*backend.truncating, *(t for t, asked in backend.asked.items() if isinstance(asked, tuple))]
            for token in tokens:
                backend.truncating.pop(token, None)
                backend.asked.pop(token, None)
                self.handle(backend, Truncated(token))

    @rule(file=st.none() | files)
    def change_on_the_host(self, file: int | None) -> None:
        slot = None if file is None else self.files[file][1] % 2
        self.loop.do(lambda: self.allocator.changed(slot))

    @rule(number=backends)
    def stop_reading(self, number: int) -> None:
        if number in self.members:
            self.members[number].deaf = True

    @rule(number=backends)
    def read_again(self, number: int) -> None:
        if number in self.members and not self.members[number].dropped:
            self.members[number].deaf = False

    @precondition(lambda self: self.members)
    @rule(seconds=st.sampled_from([0.01, 0.1, 3.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        """Who did not answer in time is not waited for."""
        self.loop.now += seconds
        asked = [one for backend in self.members.values() for one in backend.asked.values() if isinstance(one, tuple)]
        overdue = any(self.is_over(self.begun_at[begun], truncations.REVOKE_SECONDS) for _, _, begun in asked)
        for backend in self.members.values():
            backend.excused |= overdue and bool(backend.pending)
            for token, (_, granted) in list(backend.truncating.items()):
                if self.is_over(granted, TRUNCATE_GRANT_SECONDS):
                    del backend.truncating[token]
        self.loop.do(self.allocator.sweep)

    def is_over(self, since: float, seconds: float) -> bool:
        """Whether so much time has passed, as the loop's timers have it."""
        return since + seconds < self.loop.now + 1e-6

    @invariant()
    def what_is_known_is_what_is_mapped(self) -> None:
        if not hasattr(self, "allocator"):
            return
        # A grant that found no room in the socket has ended the connection.
        for number in [number for number, backend in self.members.items() if backend.dropped]:
            self.leave(number)
        use = self.allocator.use()
        mapped = [mapping for backend in self.members.values() for mapping in backend.mapped.values()]
        assert (use.mappings, use.windows) == (len(mapped), len(self.members))
        assert use.files == len({(mapping.device, mapping.inode) for mapping in mapped})
        assert self.slots.now == {mapping.inode % 2 for mapping in mapped if mapping.writable}
        for backend in self.members.values():
            assert backend.deaf or backend.coordinate is (len(self.members) > 1)

    def nothing_is_left(self) -> None:
        assert self.allocator.use().mapped_bytes == 0
        for kept in "_members", "_owners", "_slots":
            assert not getattr(self.allocator, kept), kept
        for kept in "_truncating", "_by_token", "_revocations":
            assert not getattr(self.allocator._truncations, kept), kept

    def teardown(self) -> None:
        # When all is answered and ended, all claims are answered.
        for number, backend in list(self.members.items()):
            self.revoke(number)
            self.end_truncations(number)
            assert backend.deaf or not backend.truncating
        assert not any(m.asked for m in self.members.values() if not (m.deaf or m.dropped))
        for number in list(self.members):
            self.leave(number)
        if hasattr(self, "allocator"):
            self.nothing_is_left()
        self.loop.close()
        for fd in self.fds:
            os.close(fd)
        logging.disable(logging.NOTSET)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
