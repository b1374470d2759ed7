"""The control protocol's messages: tagged msgspec Structs, one to a packet (docs/reference/control-protocol.md).

A client says Hello and is told Welcome or Refused. A backend then asks to Join, is granted a journal, takes
its semaphore, says Ready, and is a member once it is told Registered; from then on coherenced may Ask for
its counters, and it may ask coherenced to Watch what its guest is to cache. One whose guest has a DAX window
announces it with Window, and may then Claim and Release parts of it; every member asks to Truncate a file that
others may have mapped (docs/concepts/dax.md). A control client asks for StatusPage after StatusPage, or for DaxPage
after DaxPage; or it says Subscribe, and is sent Changes from then on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from coherent_vfs.coherence.protocol.constants import LABEL_MAX

PROTOCOL = 4

UInt = Annotated[int, Meta(ge=0)]
# Labels are shown on terminals: no control characters.
Label = Annotated[str, Meta(max_length=LABEL_MAX, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
# Bytes of a path in a message.
MAX_PATH = 4096
Counters = Annotated[dict[Label, UInt], Meta(max_length=32)]
# Mappings or ranges in one message. A packet has room for so many, however long their numbers are.
MAX_MAPPINGS = 1024
# Files in one DaxPage.
MAX_FILES = 100
# Seconds after which TruncateGranted ends by itself: a backend cannot keep others off a file for longer.
TRUNCATE_GRANT_SECONDS = 15.0


class Mapping(Struct, frozen=True, array_like=True):
    """A part of a file in a guest's DAX window.

    Args:
        device, inode: st_dev and st_ino of the file.
        offset: in the file, length: of the part, moffset: in the window. All in bytes, and whole chunks.
        writable: whether the guest may store into it.
    """

    device: UInt
    inode: UInt
    offset: UInt
    length: UInt
    moffset: UInt
    writable: bool


class Hello(Struct, tag="hello", frozen=True):
    """First message of every client: the protocol version it speaks, and what it is."""

    protocol: int
    role: Literal["backend", "control"]


class Join(Struct, tag="join", frozen=True):
    """With one descriptor, O_PATH: a backend asks for membership, for the share whose root this directory is.

    Args:
        guest: how people call the guest.
        cache: the share's cache mode.
        key: of the journal that this process holds already, when it comes back to a restarted daemon.
    """

    guest: Label
    cache: Label
    key: UInt | None = None


class Ready(Struct, tag="ready", frozen=True):
    """The backend has mapped what it was granted and holds the semaphore.

    Args:
        window: whether a DAX window will follow; until its last part is here coherenced knows that it does not know
            all mappings.
    """

    window: bool = False


class Watch(Struct, tag="watch", frozen=True):
    """With one descriptor, O_PATH: the backend asks for a watch on this directory, or file with several links.

    Args:
        token: comes back with the answer.
    """

    token: UInt


class Unwatch(Struct, tag="unwatch", frozen=True):
    """The backend's guest has gone: nobody relies on what was asked for with Watch until now. There is no answer."""


class Window(Struct, tag="window", frozen=True):
    """The backend's guest has a DAX window; one for each connection. Windowed is the answer.

    Args:
        size: of the window, bytes, whole chunks.
        mappings: what is in it already, when the backend comes back to a restarted daemon.
        more: whether there are more mappings than fit: then the message is sent again with them, after its answer.
    """

    size: UInt
    mappings: Annotated[list[Mapping], Meta(max_length=MAX_MAPPINGS)] = []
    more: bool = False


class Claim(Struct, tag="claim", frozen=True):
    """The backend wants to map a part of a file into its guest's window. Claimed is the answer.

    Args:
        token: comes back with the answer.
        device, inode, offset, length, writable: as in Mapping.
        moffset: in the window; None: coherenced chooses it.
    """

    token: UInt
    device: UInt
    inode: UInt
    offset: UInt
    length: UInt
    moffset: UInt | None
    writable: bool


class Release(Struct, tag="release", frozen=True):
    """The backend has unmapped these ranges: moffset and length of each, as claimed. There is no answer."""

    ranges: Annotated[list[tuple[UInt, UInt]], Meta(max_length=MAX_MAPPINGS)]


class Truncate(Struct, tag="truncate", frozen=True):
    """With one descriptor, open for writing: the backend is about to truncate this file. The answer is TruncateGranted.

    The descriptor proves that the backend may truncate the file; others lose their mappings for it.

    Args:
        token: comes back with the answer.
        size: the new size of the file, bytes.
    """

    token: UInt
    size: UInt


class Truncated(Struct, tag="truncated", frozen=True):
    """The truncation is over: the file has its new size, or keeps the old one. The token is that of Truncate."""

    token: UInt


class Revoked(Struct, tag="revoked", frozen=True):
    """The backend has done what Revoke with this token asked for."""

    token: UInt


class Answer(Struct, tag="answer", frozen=True):
    """The backend's counters, for Ask."""

    counters: Counters


class StatusQuestion(Struct, tag="status?", frozen=True):
    """A control client asks for the status, with the backends from number `first` on."""

    first: UInt = 0


class DaxQuestion(Struct, tag="dax?", frozen=True):
    """A control client asks for the DAX windows from number `first` on, and the `files` of which most is mapped."""

    first: UInt = 0
    files: Annotated[int, Meta(ge=0, le=MAX_FILES)] = 10


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


class Windowed(Struct, tag="windowed", frozen=True):
    """The answer to Window.

    Args:
        error: an errno, 0 when the window is known now: EFBIG when it is larger than `limit`, EDQUOT when there is
            no room for it besides the others, EINVAL when it has no whole chunks.
        limit: largest window that a guest may have, bytes.
        refused: how many of the mappings made no sense.
    """

    error: int
    limit: int
    refused: int


class Claimed(Struct, tag="claimed", frozen=True):
    """The answer to Claim.

    Args:
        moffset: in the window, of what was granted.
        error: an errno, 0 when it was granted: ENOSPC (no room in the window), EBUSY (overlaps
            what is mapped), EINVAL (no whole chunks, or beyond the window), EAGAIN (too many claims are waiting).
    """

    token: int
    moffset: int
    error: int


class Coordinate(Struct, tag="coordinate", frozen=True):
    """Whether others have windows, so that Truncate is needed. Sent after Registered, and when it changes."""

    truncations: bool


class TruncateGranted(Struct, tag="truncate-granted", frozen=True):
    """The answer to Truncate: the backend may truncate the file, until TRUNCATE_GRANT_SECONDS after this was sent."""

    token: int


class Revoke(Struct, tag="revoke", frozen=True):
    """A file is about to be truncated to `size` bytes: remove mappings beyond that size, then send Revoked.

    Until Resize arrives the backend must not map anything of the file beyond this size.
    """

    token: int
    device: int
    inode: int
    size: int


class Resize(Struct, tag="resize", frozen=True):
    """A mapped file may have a new size, or a revocation is over: read the size of the file and map it accordingly."""

    device: int
    inode: int


class Ask(Struct, tag="ask", frozen=True):
    """The daemon asks for the backend's counters."""


class Backend(Struct, frozen=True):
    """One member in the status.

    Args:
        device, inode: st_dev and st_ino of its share's root.
        counters: None when it did not answer in time.
    """

    pid: int
    guest: str
    cache: str
    device: int
    inode: int
    seconds: float
    counters: dict[str, int] | None


FloorReason = Literal["trusted", "overflow", "mount", "moved", "unknown", "death", "shares"]
"""Why the floor was raised.

trusted: the table can be trusted again: the daemon has started, or a backend that was away is back or dead;
overflow: the host watch lost events;
mount: something was mounted or unmounted where it matters;
moved: something was moved from a watched directory to where nobody watches;
unknown: the host watch cannot find out what has changed;
death: a backend died and may have changed what nobody knows;
shares: many shares have ended, and are forgotten.
"""


class Watching(Struct, frozen=True):
    """The host watch in the status.

    Args:
        kind: how it watches.
        watches, limit: how much is watched, and how much can be.
        refused: requests of backends that were refused, since this daemon started.
        overflows: how often events were lost.
        events: changes seen; of these
        bumped: were made on the host, or may have been;
        own: were surely bumped by a backend;
        gone: were writes to files without a name by now, where only the change of the name counts.
    """

    kind: str
    watches: int
    limit: int
    refused: int
    overflows: int
    events: int
    bumped: int
    own: int
    gone: int


class DaxUse(Struct, frozen=True):
    """DAX windows in the status, all together. Sizes are in bytes.

    Args:
        windows, window_bytes: how many, and their sizes.
        window_limit: largest window that a guest may have.
        mappings, mapped_bytes: what is mapped in them.
        total_limit: of window_bytes.
        files: of which something is mapped.
        refused: claims that were refused since this daemon started.
    """

    windows: int
    window_bytes: int
    window_limit: int
    mappings: int
    mapped_bytes: int
    total_limit: int
    files: int
    refused: int


class Status(Struct, frozen=True):
    """The daemon and its table.

    Args:
        trusted: whether cached things may be used at all (the floor is not set to trust nothing).
        removed: whether the table's file was removed, or is another one now, while the daemon runs.
        missing: processes of backends that live but have not come back to this daemon yet.
        outside: processes of backends that serve their guests with an earlier table, which was removed.
        bumps_per_second: over the last second.
        floor_raises: since this daemon started, by reason; distrusts: likewise, all together.
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
    removed: bool
    roots: int
    missing: list[int]
    outside: list[int]
    bumps_per_second: float
    floor_raises: dict[FloorReason, int]
    distrusts: int
    watch: Watching
    dax: DaxUse


class StatusPage(Struct, tag="status", frozen=True):
    """The status with some of the backends; ask again from `next` on unless it is None."""

    status: Status
    backends: list[Backend]
    next: int | None


class WindowUse(Struct, frozen=True):
    """One DAX window.

    Args:
        guest, pid: of its backend.
        size: of the window, mapped_bytes: of its mappings.
        refused: claims that were refused.
    """

    guest: str
    pid: int
    size: int
    mappings: int
    mapped_bytes: int
    refused: int


class FileUse(Struct, frozen=True):
    """One file of which something is mapped.

    Args:
        device, inode: st_dev and st_ino.
        mapped_bytes: in all windows.
        windows: in how many.
    """

    device: int
    inode: int
    mappings: int
    mapped_bytes: int
    windows: int


class DaxPage(Struct, tag="dax", frozen=True):
    """Some of the DAX windows; ask again from `next` on unless it is None."""

    use: DaxUse
    windows: list[WindowUse]
    files: list[FileUse]
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


FromBackend = Join | Ready | Watch | Unwatch | Window | Claim | Release | Truncate | Truncated | Revoked | Answer
FromClient = Hello | FromBackend | StatusQuestion | DaxQuestion | Subscribe
ToBackend = Granted | Registered | Watched | Windowed | Claimed | Coordinate | TruncateGranted | Revoke | Resize | Ask
FromDaemon = Welcome | Refused | ToBackend | StatusPage | DaxPage | Subscribed | Changes
Message = FromClient | FromDaemon

CLIENT_DECODER: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
DAEMON_DECODER: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)
ENCODER = msgspec.msgpack.Encoder()
