"""The control protocol's messages: tagged msgspec Structs, one to a packet (docs/coherenced.md).

A client says Hello and is told Welcome or Refused. A backend then asks to Join, is granted a journal, takes
its semaphore, says Ready, and is a member once it is told Registered; from then on coherenced may Ask for
its counters, and it may ask coherenced to Watch what its guest is to cache. A control client asks for
StatusPage after StatusPage; or it says Subscribe, and is sent Changes from then on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

PROTOCOL = 2

UInt = Annotated[int, Meta(ge=0)]
# Labels are shown on terminals: no control characters.
Label = Annotated[str, Meta(max_length=64, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
# Bytes of a path in a message.
MAX_PATH = 4096
Counters = Annotated[dict[Label, UInt], Meta(max_length=32)]


class Hello(Struct, tag="hello", frozen=True):
    """First message of every client: the protocol version it speaks, and what it is."""

    protocol: int
    role: Literal["backend", "control"]


class Join(Struct, tag="join", frozen=True):
    """A backend asks for membership.

    Args:
        guest: how people call the guest.
        cache: the share's cache mode.
        device, inode: st_dev and st_ino of the share's root.
        key: of the journal that this process holds already, when it comes back to a restarted daemon.
    """

    guest: Label
    cache: Label
    device: UInt
    inode: UInt
    key: UInt | None = None


class Ready(Struct, tag="ready", frozen=True):
    """The backend has mapped what it was granted and holds the semaphore."""


class Watch(Struct, tag="watch", frozen=True):
    """With one descriptor, O_PATH: the backend asks for a watch on this directory, or file with several links.

    Args:
        token: comes back with the answer.
    """

    token: UInt


class Answer(Struct, tag="answer", frozen=True):
    """The backend's counters, for Ask."""

    counters: Counters


class StatusQuestion(Struct, tag="status?", frozen=True):
    """A control client asks for the status, with the backends from number `first` on."""

    first: UInt = 0


class Subscribe(Struct, tag="subscribe", frozen=True):
    """A control client wants to be told of changes.

    Args:
        path: only of those at this path or under it; empty for all.
    """

    path: Annotated[bytes, Meta(max_length=MAX_PATH)] = b""


class Welcome(Struct, tag="welcome", frozen=True):
    """First message of the daemon: the version it speaks and the domain of its table."""

    protocol: int
    domain: bytes


class Refused(Struct, tag="refused", frozen=True):
    """The daemon will not go on with this client; the reason is for people, with its remedy."""

    reason: str


class Granted(Struct, tag="granted", frozen=True):
    """With three descriptors: the table, its leases, and the journal with this key, all writable."""

    key: int


class Registered(Struct, tag="registered", frozen=True):
    """The backend is a member: its death is noticed and its share's root is in the table."""


class Watched(Struct, tag="watched", frozen=True):
    """The answer to Watch.

    Args:
        ok: whether the thing is watched from now on, as long as this connection lasts.
    """

    token: UInt
    ok: bool


class Ask(Struct, tag="ask", frozen=True):
    """The daemon asks for the backend's counters."""


class Backend(Struct, frozen=True):
    """One member in the status. `counters` is None when it did not answer in time."""

    pid: int
    guest: str
    cache: str
    device: int
    inode: int
    seconds: float
    counters: dict[str, int] | None


class Watching(Struct, frozen=True):
    """The host watch in the status.

    Args:
        kind: how it watches.
        watches, limit: how much is watched, and how much can be.
        refused: requests of backends that were refused, since this daemon started.
        overflows: how often events were lost.
        events: changes seen; of these
        bumped: were made on the host, or may have been;
        own: were surely bumped by a backend.
    """

    kind: str
    watches: int
    limit: int
    refused: int
    overflows: int
    events: int
    bumped: int
    own: int


class Status(Struct, frozen=True):
    """The daemon and its table.

    Args:
        trusted: whether cached things may be used at all (the floor is not set to trust nothing).
        missing: processes of backends that live but have not come back to this daemon yet.
        bumps_per_second: over the last second.
        floor_raises: since this daemon started; distrusts likewise.
        dax: DAX windows in use.
    """

    table: str
    domain: str
    pid: int
    seconds: float
    slots: int
    sequence: int
    floor: int
    trusted: bool
    roots: int
    missing: list[int]
    bumps_per_second: float
    floor_raises: int
    distrusts: int
    watch: Watching
    dax: list[str]


class StatusPage(Struct, tag="status", frozen=True):
    """The status with some of the backends; ask again from `next` on unless it is None."""

    status: Status
    backends: list[Backend]
    next: int | None


class Subscribed(Struct, tag="subscribed", frozen=True):
    """The answer to Subscribe: changes that are made from now on will be told."""


class Change(Struct, frozen=True):
    """One change, or several equal ones that followed each other.

    Args:
        time: when the first was seen, seconds since 1970.
        who: the guest that made it, or "host".
        what: create, modify, attrib, delete, move from or move to.
        path: of what has changed, as its bytes are on the host; of one above MAX_PATH "..." and its end.
        times: how many there were.
    """

    time: float
    who: str
    what: str
    path: bytes
    times: int


class Changes(Struct, tag="changes", frozen=True):
    """Told to a subscriber.

    Args:
        changes: in the order in which they were seen.
        missed: how many more there were after these that are not told, as the subscriber did not read fast enough.
    """

    changes: list[Change]
    missed: int


FromClient = Hello | Join | Ready | Watch | Answer | StatusQuestion | Subscribe
FromDaemon = Welcome | Refused | Granted | Registered | Watched | Ask | StatusPage | Subscribed | Changes
Message = FromClient | FromDaemon

CLIENT_DECODER: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
DAEMON_DECODER: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)
ENCODER = msgspec.msgpack.Encoder()
