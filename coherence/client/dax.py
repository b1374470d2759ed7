"""A backend's side of the DAX window allocator: what its guest has mapped, and files that are about to shrink.

All calls and callbacks are in the thread of the backend's event loop, and none waits. While coherenced is away
what is asked for waits for it, AWAY_SECONDS at most; what is mapped stays mapped.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.log import get_logger
from coherent_vfs.coherence.common.sizes import size_text
from coherent_vfs.coherence.protocol.connection import Connection, Dropped, Full
from coherent_vfs.coherence.protocol.messages import (
    MAX_MAPPINGS,
    SHRUNK_SECONDS,
    Claim,
    Claimed,
    Coordinate,
    FromBackend,
    FromDaemon,
    Mapping,
    Release,
    Settle,
    Shrink,
    Shrinkable,
    Shrunk,
    Window,
    Windowed,
    Withdraw,
    Withdrawn,
)

log = get_logger(__name__)

# How long requests wait for coherenced to come back.
AWAY_SECONDS = 5.0
AGAIN_SECONDS = 0.01
# For how long after it was asked for a grant is believed. coherenced counts from when it grants, which is later; what
# is left is for the time between a last look at the clock and the end of the system call.
GRANT_SECONDS = SHRUNK_SECONDS - 5.0
# Unanswered requests: so few answers always find room in the socket, however late they are read.
MAX_CLAIMS = 64
MAX_SHRINKS = 16

FromAllocator = Windowed | Claimed | Coordinate | Shrinkable | Withdraw | Settle
Done = Callable[[], None]
OnWithdraw = Callable[[int, int, int, Done], None]
OnSettle = Callable[[int, int], None]


class Timer(Protocol):
    """What this needs of the backend's event loop."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call back once, after so many seconds."""


@dataclass(slots=True)
class _Claim:
    message: Claim
    done: Callable[[int, int], None]


@dataclass(slots=True)
class _Shrink:
    message: Shrink
    fd: int
    done: Done
    asked: float = 0.0
    granted: bool = False


class DaxClient:
    """The DAX part of a Membership, which makes it.

    Args:
        window: size of the guest's window, bytes; 0 when it has none. It may Shrink files nevertheless.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._withdraw: OnWithdraw = lambda device, inode, size, done: done()
        self._settle: OnSettle = lambda device, inode: None
        self._timer: Timer | None = None
        self._connection: Connection[FromDaemon] | None = None
        # Whether the daemon knows the window and all that is in it.
        self._reported = False
        self._unreported: deque[Mapping] = deque()
        self._refused = False
        # Whether requests do not wait (any longer) for the daemon.
        self._given_up = False
        self._losses = 0
        # Whether others may have windows.
        self._coordinate = True
        self._tokens = count(1)
        self._mappings: dict[int, Mapping] = {}
        # By token, in their order: all that have no answer yet, and those that have not been sent.
        self._claims: dict[int, _Claim] = {}
        self._claims_waiting: deque[int] = deque()
        self._shrinks: dict[int, _Shrink] = {}
        self._shrinks_waiting: deque[int] = deque()
        self._withdrawn: set[tuple[int, int]] = set()
        self._outbox: deque[tuple[FromBackend, Sequence[int]]] = deque()
        self._retrying = False

    def attach(self, withdraw: OnWithdraw, settle: OnSettle) -> None:
        """Who takes away and restores what this guest has mapped; to be called before the first claim.

        Args:
            withdraw: called with (device, inode, size, done): another guest is about to cut this file to `size`
                bytes. Take away what is mapped beyond, then call done(). Nothing beyond `size` may be mapped again
                before settle is called for the file.
            settle: called with (device, inode) when the file may have changed its size on the host, when a
                withdrawal is over, and for each mapped file after coherenced has come back: look at its size, take
                away what is mapped beyond its end, and restore what is before it.
        """
        self._withdraw = withdraw
        self._settle = settle

    def claim(
        self,
        device: int,
        inode: int,
        offset: int,
        length: int,
        place: int | None,
        writable: bool,
        done: Callable[[int, int], None],
    ) -> None:
        """Ask for a part of the window, before anything is mapped there.

        Args:
            device, inode: st_dev and st_ino of the file.
            offset: in the file, length: of the part; bytes, whole chunks.
            place: in the window; None: coherenced chooses one.
            writable: whether the guest may store into it. What was granted for reading is made writable by claiming
                the same again.
            done: called with (place, errno), also from within this call. errno is 0 when it was granted, and the
                place belongs to the guest until it is released; ENOSPC: a limit is reached or the window is full or
                refused; EBUSY: overlaps another; EINVAL: no whole chunks or beyond the window; EAGAIN: coherenced
                is away.
        """
        if self._refused or not self._window:
            done(place or 0, errno.ENOSPC)
        elif self._given_up:
            done(place or 0, errno.EAGAIN)
        else:
            token = next(self._tokens)
            self._claims[token] = _Claim(Claim(token, device, inode, offset, length, place, writable), done)
            self._claims_waiting.append(token)
            self._send()

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """Give back (place, length) of each of these, as they were granted, after they were unmapped.

        One that was not granted so is refused here, with a log line.
        """
        known = []
        for place, length in places:
            mapping = self._mappings.get(place)
            if mapping is None or mapping.length != length:
                log.warning("a release of what was not granted", place=place, length=length)
                continue
            del self._mappings[place]
            known.append((place, length))
        # While the daemon is being told of the window, too: it may have been told of these.
        if self._connection is not None:
            for first in range(0, len(known), MAX_MAPPINGS):
                self._post(Release(known[first : first + MAX_MAPPINGS]))

    def shrink(self, fd: int, size: int, done: Done) -> int:
        """Before a file is made smaller: let others take away what they have mapped beyond its new end.

        Args:
            fd: a descriptor of the file, open for writing, which the caller goes on owning, and keeps open until
                it has called shrunk.
            size: that the file will have, bytes.
            done: called when the file may be made smaller, also from within this call; again where coherenced has
                come back meanwhile and grants it anew. See is_granted.

        Returns:
            A token, with which shrunk must be called in any case: after the change, whether or not it was possible,
            or when it is not wanted any more (done is not called then).
        """
        token = next(self._tokens)
        if not self.coordinates:
            done()
            return token
        self._shrinks[token] = _Shrink(Shrink(token, size), fd, done)
        self._shrinks_waiting.append(token)
        self._send()
        return token

    def shrunk(self, token: int) -> None:
        """The file has its new size, or will keep the old one."""
        if self._shrinks.pop(token, None) is None:
            return
        if token in self._shrinks_waiting:
            self._shrinks_waiting.remove(token)
        elif (unsent := next((one for one in self._outbox if _is_shrink(one[0], token)), None)) is not None:
            self._outbox.remove(unsent)
        else:
            self._post(Shrunk(token))
        self._send()

    def is_granted(self, token: int) -> bool:
        """Whether a file may be made smaller still: coherenced ends what it granted after SHRUNK_SECONDS.

        Where it is not so any more, call shrunk and ask anew.
        """
        if not self.coordinates:
            return True
        shrink = self._shrinks.get(token)
        return shrink is not None and shrink.granted and _now() - shrink.asked < GRANT_SECONDS

    @property
    def has_news(self) -> bool:
        """Whether coherenced has said something that was not read yet: then what this knows may be out of date."""
        return self._connection is not None and self._connection.has_news()

    @property
    def coordinates(self) -> bool:
        """Whether others may have windows, so that shrink has a use now."""
        return self._coordinate and not self._given_up

    # --- for the Membership ---------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Size of the window, bytes; 0 when there is none."""
        return self._window

    @property
    def reported(self) -> bool:
        """Whether the daemon knows all of the window, or has refused it."""
        return self._reported

    def serve(self, timer: Timer) -> None:
        """The backend's event loop runs from now on."""
        self._timer = timer

    def joined(self, connection: Connection[FromDaemon]) -> None:
        """The backend has become a member. Dropped when the window cannot be told."""
        self._connection = connection
        self._unreported = deque(self._mappings.values())
        if self._window:
            self._tell()
        else:
            self._all_reported()

    def lost(self) -> None:
        """The connection is over."""
        self._connection = None
        self._reported = False
        self._outbox.clear()
        self._claims_waiting = deque(self._claims)
        self._shrinks_waiting = deque(self._shrinks)
        for shrink in self._shrinks.values():
            # The next daemon does not know of it, and lets others map the file.
            shrink.granted = False
        self._losses += 1
        if self._timer is not None:
            losses = self._losses
            self._timer.call_later(AWAY_SECONDS, lambda: self._give_up(losses))

    def close(self) -> None:
        """Nobody is told anything any more."""
        self._connection = None
        self._timer = None
        self._reported = False

    def handle(self, message: FromAllocator) -> None:
        """Act on a message. Dropped when it is not expected, UserError when the first window is refused."""
        match message:
            case Windowed() if self._window and not self._reported:
                self._windowed(message)
            case Claimed() if message.token in self._claims:
                self._claimed(self._claims.pop(message.token), message)
            case Coordinate():
                self._coordinate = message.shrinks
            case Shrinkable() if message.token in self._shrinks:
                self._grant(self._shrinks[message.token])
            case Shrinkable():
                # It was given up meanwhile.
                pass
            case Withdraw():
                self._withdrawn.add((message.device, message.inode))
                self._withdraw(message.device, message.inode, message.size, self._withdrawal(message.token))
            case Settle():
                self._withdrawn.discard((message.device, message.inode))
                self._settle(message.device, message.inode)
            case _:
                raise Dropped(f"an unexpected message: {type(message).__name__}")
        self._send()

    # --- the window -----------------------------------------------------------------------------------------

    def _tell(self) -> None:
        assert self._connection is not None
        page = [self._unreported.popleft() for _ in range(min(MAX_MAPPINGS, len(self._unreported)))]
        self._connection.send(Window(self._window, page, bool(self._unreported)))

    def _windowed(self, answer: Windowed) -> None:
        if answer.refused:
            log.error("coherenced refuses to know mappings of this guest", count=answer.refused)
        if answer.error:
            told = _refusal(self._window, answer)
            if self._timer is None:
                raise UserError(told)
            if not self._refused:
                log.error("coherenced refuses the DAX window: nothing new is mapped", reason=told)
            self._refused = True
            self._unreported.clear()
        if self._unreported:
            self._tell()
        else:
            self._refused = bool(answer.error)
            self._all_reported()

    def _all_reported(self) -> None:
        self._reported = True
        self._given_up = False
        if self._refused:
            self._fail_claims(errno.ENOSPC)
        withdrawn, self._withdrawn = self._withdrawn, set()
        for device, inode in withdrawn | {(mapping.device, mapping.inode) for mapping in self._mappings.values()}:
            self._settle(device, inode)
        self._send()

    def _give_up(self, losses: int) -> None:
        if self._reported or losses != self._losses or self._timer is None:
            return
        self._given_up = True
        self._fail_claims(errno.EAGAIN)
        for shrink in list(self._shrinks.values()):
            shrink.done()
        withdrawn, self._withdrawn = self._withdrawn, set()
        for device, inode in withdrawn:
            self._settle(device, inode)

    # --- requests -------------------------------------------------------------------------------------------

    def _claimed(self, claim: _Claim, answer: Claimed) -> None:
        asked = claim.message
        if not answer.error:
            self._mappings[answer.place] = Mapping(
                asked.device, asked.inode, asked.offset, asked.length, answer.place, asked.writable
            )
        claim.done(answer.place, answer.error)

    def _fail_claims(self, error: int) -> None:
        claims, self._claims = self._claims, {}
        self._claims_waiting.clear()
        for claim in claims.values():
            claim.done(claim.message.place or 0, error)

    def _grant(self, shrink: _Shrink) -> None:
        if not shrink.granted:
            shrink.granted = True
            shrink.done()

    def _withdrawal(self, token: int) -> Done:
        losses = self._losses

        def done() -> None:
            if losses == self._losses:
                self._post(Withdrawn(token))

        return done

    def _post(self, message: FromBackend, fds: Sequence[int] = ()) -> None:
        self._outbox.append((message, fds))
        self._flush()

    def _send(self) -> None:
        """Ask for what may be asked for now."""
        if not self._reported:
            return
        while self._claims_waiting and len(self._claims) - len(self._claims_waiting) < MAX_CLAIMS:
            self._outbox.append((self._claims[self._claims_waiting.popleft()].message, ()))
        while self._shrinks_waiting and len(self._shrinks) - len(self._shrinks_waiting) < MAX_SHRINKS:
            shrink = self._shrinks[self._shrinks_waiting.popleft()]
            shrink.asked = _now()
            self._outbox.append((shrink.message, [shrink.fd]))
        self._flush()

    def _flush(self) -> None:
        while self._reported and self._outbox and not self._retrying:
            assert self._connection is not None
            try:
                self._connection.send(*self._outbox[0])
            except Full:
                self._retrying = True
                assert self._timer is not None
                self._timer.call_later(AGAIN_SECONDS, self._retry)
                return
            except Dropped:
                # Its socket tells.
                return
            self._outbox.popleft()

    def _retry(self) -> None:
        self._retrying = False
        self._flush()


def _now() -> float:
    """Seconds, counted on while this process is stopped and while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_shrink(message: FromBackend, token: int) -> bool:
    return isinstance(message, Shrink) and message.token == token


def _refusal(window: int, answer: Windowed) -> str:
    if answer.error == errno.EFBIG:
        return (
            f"a DAX window of {size_text(window)} is more than the {size_text(answer.limit)} that coherenced allows: "
            "make it smaller, or start coherenced with a larger --dax-window"
        )
    if answer.error == errno.EDQUOT:
        return (
            f"a DAX window of {size_text(window)} is more than coherenced has left for all of them: make it smaller, "
            "or start coherenced with a larger --dax-total"
        )
    return f"a DAX window of {window} bytes: use a multiple of 2M"
