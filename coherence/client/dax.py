"""A backend's side of the DAX window allocator: the mappings of its guest, and truncations of files.

All calls and callbacks run in the thread of the backend's event loop; none blocks. While coherenced is away,
requests wait for it for at most AWAY_SECONDS; mappings stay.
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
    TRUNCATE_GRANT_SECONDS,
    Claim,
    Claimed,
    Coordinate,
    FromBackend,
    FromDaemon,
    Mapping,
    Release,
    Resize,
    Revoke,
    Revoked,
    Truncate,
    Truncated,
    TruncateGranted,
    Window,
    Windowed,
)

log = get_logger(__name__)

# How long requests wait for coherenced to come back.
AWAY_SECONDS = 5.0
AGAIN_SECONDS = 0.01
# A grant is valid here for so long after the request. coherenced counts from its answer, which is later. The rest is a
# reserve for the time between the last look at the clock and the end of the system call.
GRANT_SECONDS = TRUNCATE_GRANT_SECONDS - 5.0
# Unanswered requests. The socket has room for so many answers, however late they are read.
MAX_CLAIMS = 64
MAX_TRUNCATIONS = 16

FromAllocator = Windowed | Claimed | Coordinate | TruncateGranted | Revoke | Resize
Done = Callable[[], None]
OnRevoke = Callable[[int, int, int, Done], None]
OnResize = Callable[[int, int], None]


class Timer(Protocol):
    """What this needs of the backend's event loop."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call back once, after so many seconds."""


@dataclass(slots=True)
class _Claim:
    message: Claim
    done: Callable[[int, int], None]


@dataclass(slots=True)
class _Truncation:
    message: Truncate
    fd: int
    done: Done
    asked: float = 0.0
    granted: bool = False


class DaxClient:
    """The DAX part of a Membership, which makes it.

    Args:
        window: size of the guest's window, bytes; 0: it has none. It can truncate files nevertheless.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._revoke: OnRevoke = lambda device, inode, size, done: done()
        self._resize: OnResize = lambda device, inode: None
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
        # By token, in order: all without an answer, and those of them that were not sent.
        self._claims: dict[int, _Claim] = {}
        self._claims_waiting: deque[int] = deque()
        self._truncations: dict[int, _Truncation] = {}
        self._truncations_waiting: deque[int] = deque()
        self._revoked: set[tuple[int, int]] = set()
        self._outbox: deque[tuple[FromBackend, Sequence[int]]] = deque()
        self._retrying = False

    def attach(self, revoke: OnRevoke, resize: OnResize) -> None:
        """Set the callbacks that revoke and restore mappings of this guest. Call it before the first claim.

        Args:
            revoke: called with (device, inode, size, done): another guest is about to truncate this file to `size`
                bytes. Remove mappings beyond that size, then call done(). Map nothing beyond `size` again before
                resize is called for the file.
            resize: called with (device, inode) when the file may have a new size on the host, when a revocation is
                over, and for each mapped file after coherenced has come back. Read the size of the file, remove
                mappings beyond its end, and restore those before it.
        """
        self._revoke = revoke
        self._resize = resize

    def claim(
        self,
        device: int,
        inode: int,
        offset: int,
        length: int,
        moffset: int | None,
        writable: bool,
        done: Callable[[int, int], None],
    ) -> None:
        """Ask for a range of the window, before anything is mapped there.

        Args:
            device, inode: st_dev and st_ino of the file.
            offset: in the file, length: of the part; bytes, whole chunks.
            moffset: in the window; None: coherenced chooses it.
            writable: whether the guest may store into it. To make a read-only mapping writable, claim it again.
            done: called with (moffset, errno), possibly before this returns. errno is 0 when it was granted: the
                range belongs to the guest until it is released. ENOSPC: a limit is reached, or the window is full or
                refused; EBUSY: overlaps another; EINVAL: no whole chunks or beyond the window; EAGAIN: coherenced
                is away.
        """
        if self._refused or not self._window:
            done(moffset or 0, errno.ENOSPC)
        elif self._given_up:
            done(moffset or 0, errno.EAGAIN)
        else:
            token = next(self._tokens)
            self._claims[token] = _Claim(Claim(token, device, inode, offset, length, moffset, writable), done)
            self._claims_waiting.append(token)
            self._send()

    def release(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give back ranges, (moffset, length) as they were granted, after they were unmapped.

        A range that was not granted is skipped, with a log line.
        """
        known = []
        for moffset, length in ranges:
            mapping = self._mappings.get(moffset)
            if mapping is None or mapping.length != length:
                log.warning("a release of what was not granted", moffset=moffset, length=length)
                continue
            del self._mappings[moffset]
            known.append((moffset, length))
        # Also while the window is being reported: these mappings may be in a part that was sent.
        if self._connection is not None:
            for first in range(0, len(known), MAX_MAPPINGS):
                self._post(Release(known[first : first + MAX_MAPPINGS]))

    def truncate(self, fd: int, size: int, done: Done) -> int:
        """Before a file is truncated: have the mappings revoked that others have beyond its new end.

        Args:
            fd: a descriptor of the file, open for writing. It stays the caller's, who keeps it open until it calls
                truncated.
            size: the new size, bytes.
            done: called when the file may be truncated, possibly before this returns. It is called again when
                coherenced has come back meanwhile and grants it anew. See is_granted.

        Returns:
            A token. Call truncated with it in any case: after the system call, whether or not it succeeded, or when
            the truncation is not wanted any more (then done is not called).
        """
        token = next(self._tokens)
        if not self.coordinates:
            done()
            return token
        self._truncations[token] = _Truncation(Truncate(token, size), fd, done)
        self._truncations_waiting.append(token)
        self._send()
        return token

    def truncated(self, token: int) -> None:
        """A truncation is over: the file has its new size, or keeps the old one."""
        if self._truncations.pop(token, None) is None:
            return
        if token in self._truncations_waiting:
            self._truncations_waiting.remove(token)
        elif (unsent := next((one for one in self._outbox if _is_truncate(one[0], token)), None)) is not None:
            self._outbox.remove(unsent)
        else:
            self._post(Truncated(token))
        self._send()

    def is_granted(self, token: int) -> bool:
        """Whether the file may still be truncated: coherenced ends a grant after TRUNCATE_GRANT_SECONDS.

        If not, call truncated and ask again.
        """
        if not self.coordinates:
            return True
        truncation = self._truncations.get(token)
        return truncation is not None and truncation.granted and _now() - truncation.asked < GRANT_SECONDS

    @property
    def has_news(self) -> bool:
        """Whether there are unread messages of coherenced: then the state here may be out of date."""
        return self._connection is not None and self._connection.has_news()

    @property
    def coordinates(self) -> bool:
        """Whether others may have windows, so that truncate is needed."""
        return self._coordinate and not self._given_up

    # --- for the Membership ---------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Size of the window, bytes; 0 when there is none."""
        return self._window

    @property
    def reported(self) -> bool:
        """Whether the daemon knows all mappings of the window, or has refused it."""
        return self._reported

    def serve(self, timer: Timer) -> None:
        """The backend's event loop runs from now on."""
        self._timer = timer

    def joined(self, connection: Connection[FromDaemon]) -> None:
        """The backend has become a member. Raises Dropped when the window cannot be reported."""
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
        self._truncations_waiting = deque(self._truncations)
        for truncation in self._truncations.values():
            # The next daemon does not know the grant, and lets others map the file.
            truncation.granted = False
        self._losses += 1
        if self._timer is not None:
            losses = self._losses
            self._timer.call_later(AWAY_SECONDS, lambda: self._give_up(losses))

    def close(self) -> None:
        """Send nothing any more."""
        self._connection = None
        self._timer = None
        self._reported = False

    def handle(self, message: FromAllocator) -> None:
        """Handle a message. Raises Dropped when it is not expected, UserError when the first window is refused."""
        match message:
            case Windowed() if self._window and not self._reported:
                self._windowed(message)
            case Claimed() if message.token in self._claims:
                self._claimed(self._claims.pop(message.token), message)
            case Coordinate():
                self._coordinate = message.truncations
            case TruncateGranted() if message.token in self._truncations:
                self._grant(self._truncations[message.token])
            case TruncateGranted():
                # The request was given up meanwhile.
                pass
            case Revoke():
                self._revoked.add((message.device, message.inode))
                self._revoke(message.device, message.inode, message.size, self._revocation(message.token))
            case Resize():
                self._revoked.discard((message.device, message.inode))
                self._resize(message.device, message.inode)
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
        revoked, self._revoked = self._revoked, set()
        for device, inode in revoked | {(mapping.device, mapping.inode) for mapping in self._mappings.values()}:
            self._resize(device, inode)
        self._send()

    def _give_up(self, losses: int) -> None:
        if self._reported or losses != self._losses or self._timer is None:
            return
        self._given_up = True
        self._fail_claims(errno.EAGAIN)
        for truncation in list(self._truncations.values()):
            truncation.done()
        revoked, self._revoked = self._revoked, set()
        for device, inode in revoked:
            self._resize(device, inode)

    # --- requests -------------------------------------------------------------------------------------------

    def _claimed(self, claim: _Claim, answer: Claimed) -> None:
        asked = claim.message
        if not answer.error:
            self._mappings[answer.moffset] = Mapping(
                asked.device, asked.inode, asked.offset, asked.length, answer.moffset, asked.writable
            )
        claim.done(answer.moffset, answer.error)

    def _fail_claims(self, error: int) -> None:
        claims, self._claims = self._claims, {}
        self._claims_waiting.clear()
        for claim in claims.values():
            claim.done(claim.message.moffset or 0, error)

    def _grant(self, truncation: _Truncation) -> None:
        if not truncation.granted:
            truncation.granted = True
            truncation.done()

    def _revocation(self, token: int) -> Done:
        losses = self._losses

        def done() -> None:
            if losses == self._losses:
                self._post(Revoked(token))

        return done

    def _post(self, message: FromBackend, fds: Sequence[int] = ()) -> None:
        self._outbox.append((message, fds))
        self._flush()

    def _send(self) -> None:
        """Send waiting requests, as far as the limits permit."""
        if not self._reported:
            return
        while self._claims_waiting and len(self._claims) - len(self._claims_waiting) < MAX_CLAIMS:
            self._outbox.append((self._claims[self._claims_waiting.popleft()].message, ()))
        while self._truncations_waiting and len(self._truncations) - len(self._truncations_waiting) < MAX_TRUNCATIONS:
            truncation = self._truncations[self._truncations_waiting.popleft()]
            truncation.asked = _now()
            self._outbox.append((truncation.message, [truncation.fd]))
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
                # The socket reports it.
                return
            self._outbox.popleft()

    def _retry(self) -> None:
        self._retrying = False
        self._flush()


def _now() -> float:
    """Seconds. The clock runs on while this process is stopped and while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_truncate(message: FromBackend, token: int) -> bool:
    return isinstance(message, Truncate) and message.token == token


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
