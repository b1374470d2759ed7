"""What the actor in a guest (actor/) can be asked to do, and what it answers: the wire format of actor/actor.h."""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

HELD_FILES = 8
"""Slots for files that a context of an actor keeps open."""

TOLD_WRONG = 7
"""Nanoseconds that an mtime may be wrong for a moment in shared."""

_ACTION = struct.Struct("<BBHIIq")
_RESULT = struct.Struct("<iIIIIIQQqqI")
_REQUEST = struct.Struct("<HH")
REPLY = struct.Struct("<HHI")
"""Bytes of results that follow, context, bytes of requests consumed so far (modulo 2^32)."""


class Kind(enum.IntEnum):
    """Kinds of action: first those that change something, then the observations."""

    CREATE = 0
    WRITE = 1
    WRITE_HELD = 2
    TRUNCATE = 3
    TRUNCATE_HELD = 4
    CHMOD = 5
    CHOWN = 6
    TOUCH = 7
    SET_XATTR = 8
    RENAME = 9
    LINK = 10
    SYMLINK = 11
    UNLINK = 12
    MKDIR = 13
    RMDIR = 14
    HOLD = 15
    LSTAT = 32
    OPEN = 33
    MAP = 34
    READ_HELD = 35
    LIST = 36
    READ_LINK = 37
    GET_XATTR = 38
    ASK = 39


class Field(enum.IntEnum):
    """Fields of a result that can be watched."""

    ERROR = 0
    INODE = 1
    MODE = 2
    LINKS = 3
    SIZE = 4
    MTIME = 5
    CONTENT = 6


_WATCH = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """One action.

    Attributes:
        kind: What to do.
        path: Of what, relative to the share; empty for held files.
        other: New name of RENAME and LINK, target of SYMLINK.
        slot: Of the held file.
        flags: Mode of CHMOD, open flags of WRITE, flags of renameat2(2).
        offset: Of a write.
        length: Of a write or truncation.
        value: What is written (see contents); mtime in nanoseconds of TOUCH; uid << 16 | gid of CHOWN.
    """

    kind: Kind
    path: str = ""
    other: str = ""
    slot: int = 0
    flags: int = 0
    offset: int = 0
    length: int = 0
    value: int = 0

    def encode(self) -> bytes:
        """The action as the actor takes it."""
        fixed = _ACTION.pack(self.kind, self.slot, self.flags, self.offset, self.length, self.value)
        return fixed + self.path.encode() + b"\0" + self.other.encode() + b"\0"

    def __str__(self) -> str:
        words = [self.kind.name.lower(), self.path, f"-> {self.other}" if self.other else ""]
        for name in ("slot", "flags", "offset", "length", "value"):
            if number := getattr(self, name):
                words.append(f"{name}={oct(number) if name == 'flags' else number}")
        return " ".join(word for word in words if word)


@dataclasses.dataclass(frozen=True, slots=True)
class Watch:
    """An observation that is repeated until a field differs from a value.

    Attributes:
        observation: What to look at.
        field: Which field of its result.
        old: The value that is waited away.
        milliseconds: How long at most.
    """

    observation: Action
    field: Field
    old: int
    milliseconds: int

    def encode(self) -> bytes:
        """The action as the actor takes it."""
        look = self.observation
        fixed = _ACTION.pack(look.kind | _WATCH, self.field, self.milliseconds, look.slot, 0, self.old)
        return fixed + look.path.encode() + b"\0\0"


class Result(NamedTuple):
    """What came of an action; the fields that do not belong to it are 0.

    Attributes:
        error: 0 or an errno.
        content: CRC-32 of a file's contents, a symbolic link's target, an attribute's value, or a listing.
        size: Of a file, target or value; number of names of a listing; 0 for the status of directories.
        mtime, ctime: Nanoseconds.
        microseconds: How long the action took.
    """

    error: int
    mode: int = 0
    links: int = 0
    uid: int = 0
    gid: int = 0
    content: int = 0
    inode: int = 0
    size: int = 0
    mtime: int = 0
    ctime: int = 0
    microseconds: int = 0

    def field(self, field: Field) -> int:
        """The field that a Watch names."""
        number: int = getattr(self, field.name.lower())
        return number

    def same(self, other: Result) -> bool:
        """Whether both saw the same, however long it took."""
        return self[:-1] == other[:-1]

    def nearly(self, other: Result) -> bool:
        """Whether only mtime differs, as Linux drops its pages then (server/caching/validity.pyx)."""
        return abs(self.mtime - other.mtime) <= TOLD_WRONG and self._replace(mtime=other.mtime).same(other)

    def differences(self, other: Result) -> str:
        """What differs, for people."""
        pairs = zip(self._fields[:-1], self, other, strict=False)
        return ", ".join(f"{name} {mine} is {theirs}" for name, mine, theirs in pairs if mine != theirs)


def encode_request(context: int, actions: Sequence[Action | Watch]) -> bytes:
    """A request for a context: its actions in order."""
    body = b"".join(action.encode() for action in actions)
    return _REQUEST.pack(len(body), context) + body


def decode_results(data: bytes) -> list[Result]:
    """The results in a reply, one for each action of the request."""
    return [Result._make(fields) for fields in _RESULT.iter_unpack(data)]


def contents(length: int, value: int) -> bytes:
    """What the actor writes for a value: its 8 hexadecimal digits, again and again."""
    digits = b"%08x" % (value & 0xFFFFFFFF)
    return (digits * (length // 8 + 1))[:length]
