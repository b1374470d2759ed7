"""Files that are made smaller: others first give up what they have mapped beyond the new end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.daemon.dax.member import Member
from coherent_vfs.coherence.daemon.dax.windows import File
from coherent_vfs.coherence.protocol.connection import Dropped
from coherent_vfs.coherence.protocol.messages import SHRUNK_SECONDS, Claim, Shrinkable, Withdraw

log = get_logger(__name__)

# How long who makes a file smaller waits for the others.
WITHDRAW_SECONDS = 2.0
# Of one backend, at a time; ours asks for fewer (coherence.client.dax).
MAX_SHRINKS = 64


@dataclass(slots=True, eq=False)
class Shrink:
    """One backend's wish to make a file smaller.

    Attributes:
        member, token: who asked.
        file, size: what for, bytes.
        asked: who was asked to withdraw.
        waiting: tokens of Withdraws that it waits for.
        granted: whether it was told to go on.
        timer: ends the waiting, then the shrink.
    """

    member: Member
    token: int
    file: File
    size: int
    timer: asyncio.TimerHandle
    asked: set[Member] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    granted: bool = False


@dataclass(slots=True, eq=False)
class Cut:
    """A file that is made smaller, by one backend or several, and the claims of it that wait."""

    shrinks: list[Shrink] = field(default_factory=list)
    asked: set[Member] = field(default_factory=set)
    claims: deque[tuple[Member, Claim]] = field(default_factory=deque)


class Shrinks:
    """All files that are being made smaller.

    Args:
        holders: the members that have something of a file beyond a size mapped.
        blind: whether there may be mappings that are not known yet.
        over: called with a file and the claims that waited, after the last shrink of it.
    """

    def __init__(
        self,
        holders: Callable[[File, int], set[Member]],
        blind: Callable[[], bool],
        over: Callable[[File, deque[tuple[Member, Claim]]], None],
    ) -> None:
        self._holders = holders
        self._blind = blind
        self._over = over
        self._cuts: dict[File, Cut] = {}
        self._by_token: dict[tuple[Member, int], Shrink] = {}
        self._withdrawals: dict[int, tuple[Member, Shrink]] = {}
        self._tokens = count(1)

    def is_cut(self, file: File) -> bool:
        """Whether the file is being made smaller."""
        return file in self._cuts

    def cut_by_others(self, file: File, member: Member) -> Cut | None:
        """The cut of a file if another than this backend makes it smaller."""
        cut = self._cuts.get(file)
        return cut if cut is not None and any(shrink.member is not member for shrink in cut.shrinks) else None

    def begin(self, member: Member, token: int, file: File, size: int) -> None:
        """A backend wants to make a file smaller; Shrinkable is its answer, at once or later.

        Raises:
            Dropped: it has used the token, or wants too many at once.
        """
        if (member, token) in self._by_token:
            raise Dropped("a token that is in use")
        if sum(one is member for one, _ in self._by_token) >= MAX_SHRINKS:
            raise Dropped(f"more than {MAX_SHRINKS} files to shrink")
        timer = asyncio.get_running_loop().call_later(WITHDRAW_SECONDS, self._overdue, member, token)
        shrink = self._by_token[member, token] = Shrink(member, token, file, size, timer)
        self._cuts.setdefault(file, Cut()).shrinks.append(shrink)
        self._ask(shrink)
        self._go_on(shrink)

    def end(self, member: Member, token: int) -> None:
        """The file has its new size, or keeps the old one."""
        shrink = self._by_token.get((member, token))
        # It may have taken too long, and is over.
        if shrink is not None:
            self._end(shrink)

    def withdrawn(self, member: Member, token: int) -> None:
        """A backend has taken away what it was asked to. Dropped when it was not."""
        owner, shrink = self._withdrawals.get(token, (None, None))
        if shrink is None or owner is not member:
            raise Dropped("a Withdrawn that nobody asked for")
        self._answered(member, token, shrink)

    def look(self) -> None:
        """See whether more is known: ask who has become known to have something mapped, and go on."""
        for shrink in list(self._by_token.values()):
            self._ask(shrink)
            self._go_on(shrink)

    def leave(self, member: Member) -> None:
        """A backend is gone, and so is what it had mapped: nobody waits for it, or on account of it."""
        for token in list(member.withdrawals):
            self._answered(member, token, self._withdrawals[token][1])
        for cut in self._cuts.values():
            cut.claims = deque(claim for claim in cut.claims if claim[0] is not member)
            cut.asked.discard(member)
        for shrink in [shrink for (one, _), shrink in self._by_token.items() if one is member]:
            self._end(shrink)

    def _ask(self, shrink: Shrink) -> None:
        for member in self._new_holders(shrink):
            shrink.asked.add(member)
            self._cuts[shrink.file].asked.add(member)
            member.forget_settling(shrink.file)
            token = next(self._tokens)
            if not member.try_send(Withdraw(token, *shrink.file, shrink.size)):
                # It does not read: it will be told to settle the file when it does.
                self._mark_late(member)
                continue
            member.withdrawals.add(token)
            self._withdrawals[token] = member, shrink
            if not (member.late or shrink.granted):
                shrink.waiting.add(token)

    def _new_holders(self, shrink: Shrink) -> Iterator[Member]:
        for member in self._holders(shrink.file, shrink.size):
            if member is not shrink.member and member not in shrink.asked:
                yield member

    def _go_on(self, shrink: Shrink) -> None:
        if not (shrink.granted or shrink.waiting or self._blind()):
            self._grant(shrink)

    def _overdue(self, member: Member, token: int) -> None:
        shrink = self._by_token[member, token]
        for unanswered in shrink.waiting:
            self._mark_late(self._withdrawals[unanswered][0])
        shrink.waiting.clear()
        self._grant(shrink)

    def _mark_late(self, member: Member) -> None:
        member.late = True
        if member.warn_once("late"):
            log.warning("a backend does not give up what it has mapped in time", guest=member.guest, pid=member.pid)

    def _grant(self, shrink: Shrink) -> None:
        shrink.granted = True
        shrink.timer.cancel()
        shrink.timer = asyncio.get_running_loop().call_later(
            SHRUNK_SECONDS, self._forgotten, shrink.member, shrink.token
        )
        shrink.member.send(Shrinkable(shrink.token))

    def _forgotten(self, member: Member, token: int) -> None:
        if member.warn_once("shrunk"):
            log.warning("a backend does not say that a file is shrunk", guest=member.guest, pid=member.pid)
        self.end(member, token)

    def _answered(self, member: Member, token: int, shrink: Shrink) -> None:
        del self._withdrawals[token]
        member.withdrawals.discard(token)
        if not member.withdrawals:
            member.late = False
        if token in shrink.waiting:
            shrink.waiting.discard(token)
            self._go_on(shrink)

    def _end(self, shrink: Shrink) -> None:
        shrink.timer.cancel()
        # An answer may come yet, and changes nothing.
        shrink.granted = True
        shrink.waiting.clear()
        del self._by_token[shrink.member, shrink.token]
        cut = self._cuts[shrink.file]
        cut.shrinks.remove(shrink)
        if cut.shrinks:
            return
        del self._cuts[shrink.file]
        for member in cut.asked | self._holders(shrink.file, -1):
            member.settle_now(shrink.file)
        self._over(shrink.file, cut.claims)
