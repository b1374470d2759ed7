"""Truncations: before a file is truncated, mappings beyond the new end are revoked from all other members."""

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
from coherent_vfs.coherence.protocol.messages import TRUNCATE_GRANT_SECONDS, Claim, Revoke, TruncateGranted

log = get_logger(__name__)

# How long a truncation waits for the others' answers.
REVOKE_SECONDS = 2.0
# Of one backend, at a time. Our client sends fewer (coherence.client.dax).
MAX_TRUNCATIONS = 64


@dataclass(slots=True, eq=False)
class Truncation:
    """One backend's request to truncate a file.

    Attributes:
        member, token: of the request.
        file, size: the file, and its new size in bytes.
        asked: members that were sent a Revoke.
        waiting: tokens of the Revokes whose answers it waits for.
        granted: whether TruncateGranted was sent.
        timer: ends the waiting; later it ends the grant.
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
class TruncatingFile:
    """A file that one or several backends truncate, and the claims on it that wait for the end of that."""

    truncations: list[Truncation] = field(default_factory=list)
    asked: set[Member] = field(default_factory=set)
    claims: deque[tuple[Member, Claim]] = field(default_factory=deque)


class Truncations:
    """All files that are being truncated.

    Args:
        holders: returns the members with mappings of a file beyond a size.
        blind: whether there may be mappings that are not known yet.
        over: called with a file and its waiting claims, after its last truncation.
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
        self._truncating: dict[File, TruncatingFile] = {}
        self._by_token: dict[tuple[Member, int], Truncation] = {}
        self._revocations: dict[int, tuple[Member, Truncation]] = {}
        self._tokens = count(1)

    def is_truncating(self, file: File) -> bool:
        """Whether the file is being truncated."""
        return file in self._truncating

    def by_others(self, file: File, member: Member) -> TruncatingFile | None:
        """The truncating file, if another backend than this member truncates it."""
        truncating = self._truncating.get(file)
        if truncating is None or all(truncation.member is member for truncation in truncating.truncations):
            return None
        return truncating

    def begin(self, member: Member, token: int, file: File, size: int) -> None:
        """A backend wants to truncate a file. It is sent TruncateGranted, now or later.

        Raises:
            Dropped: the token is in use, or there are too many requests at once.
        """
        if (member, token) in self._by_token:
            raise Dropped("a token that is in use")
        if sum(one is member for one, _ in self._by_token) >= MAX_TRUNCATIONS:
            raise Dropped(f"more than {MAX_TRUNCATIONS} truncations at a time")
        timer = asyncio.get_running_loop().call_later(REVOKE_SECONDS, self._overdue, member, token)
        truncation = self._by_token[member, token] = Truncation(member, token, file, size, timer)
        self._truncating.setdefault(file, TruncatingFile()).truncations.append(truncation)
        self._ask(truncation)
        self._go_on(truncation)

    def end(self, member: Member, token: int) -> None:
        """The file has its new size, or keeps the old one."""
        truncation = self._by_token.get((member, token))
        # It may have been ended already, when its grant expired.
        if truncation is not None:
            self._end(truncation)

    def revoked(self, member: Member, token: int) -> None:
        """A backend has removed the mappings. Raises Dropped when no Revoke asked for that."""
        owner, truncation = self._revocations.get(token, (None, None))
        if truncation is None or owner is not member:
            raise Dropped("a Revoked that nobody asked for")
        self._answered(member, token, truncation)

    def look(self) -> None:
        """Look again: ask members whose mappings have become known, and grant what can be granted."""
        for truncation in list(self._by_token.values()):
            self._ask(truncation)
            self._go_on(truncation)

    def leave(self, member: Member) -> None:
        """A backend is gone, with its mappings: end its truncations, and wait for it no more."""
        for token in list(member.revocations):
            self._answered(member, token, self._revocations[token][1])
        for truncating in self._truncating.values():
            truncating.claims = deque(claim for claim in truncating.claims if claim[0] is not member)
            truncating.asked.discard(member)
        for truncation in [truncation for (one, _), truncation in self._by_token.items() if one is member]:
            self._end(truncation)

    def _ask(self, truncation: Truncation) -> None:
        for member in self._new_holders(truncation):
            truncation.asked.add(member)
            self._truncating[truncation.file].asked.add(member)
            member.forget_resize(truncation.file)
            token = next(self._tokens)
            if not member.try_send(Revoke(token, *truncation.file, truncation.size)):
                # It does not read. It is sent Resize for the file when it does again.
                self._mark_late(member)
                continue
            member.revocations.add(token)
            self._revocations[token] = member, truncation
            if not (member.late or truncation.granted):
                truncation.waiting.add(token)

    def _new_holders(self, truncation: Truncation) -> Iterator[Member]:
        for member in self._holders(truncation.file, truncation.size):
            if member is not truncation.member and member not in truncation.asked:
                yield member

    def _go_on(self, truncation: Truncation) -> None:
        if not (truncation.granted or truncation.waiting or self._blind()):
            self._grant(truncation)

    def _overdue(self, member: Member, token: int) -> None:
        truncation = self._by_token[member, token]
        for unanswered in truncation.waiting:
            self._mark_late(self._revocations[unanswered][0])
        truncation.waiting.clear()
        self._grant(truncation)

    def _mark_late(self, member: Member) -> None:
        member.late = True
        if member.warn_once("late"):
            log.warning("a backend does not give up what it has mapped in time", guest=member.guest, pid=member.pid)

    def _grant(self, truncation: Truncation) -> None:
        truncation.granted = True
        truncation.timer.cancel()
        truncation.timer = asyncio.get_running_loop().call_later(
            TRUNCATE_GRANT_SECONDS, self._forgotten, truncation.member, truncation.token
        )
        truncation.member.send(TruncateGranted(truncation.token))

    def _forgotten(self, member: Member, token: int) -> None:
        if member.warn_once("truncated"):
            log.warning("a backend does not say that a truncation is over", guest=member.guest, pid=member.pid)
        self.end(member, token)

    def _answered(self, member: Member, token: int, truncation: Truncation) -> None:
        del self._revocations[token]
        member.revocations.discard(token)
        if not member.revocations:
            member.late = False
        if token in truncation.waiting:
            truncation.waiting.discard(token)
            self._go_on(truncation)

    def _end(self, truncation: Truncation) -> None:
        truncation.timer.cancel()
        # Late answers to its Revokes must not grant it.
        truncation.granted = True
        truncation.waiting.clear()
        del self._by_token[truncation.member, truncation.token]
        truncating = self._truncating[truncation.file]
        truncating.truncations.remove(truncation)
        if truncating.truncations:
            return
        del self._truncating[truncation.file]
        for member in truncating.asked | self._holders(truncation.file, -1):
            member.resize_now(truncation.file)
        self._over(truncation.file, truncating.claims)
