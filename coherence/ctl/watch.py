"""coherencectl watch: changes as they happen, a line each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl.client import ask, connected
from coherent_vfs.coherence.protocol.connection import Dropped
from coherent_vfs.coherence.protocol.messages import MAX_PATH, Change, Changes, Subscribe, Subscribed


class ChangeLine(Struct, frozen=True):
    """A change as JSON; see coherence.protocol.messages.Change. Bytes of the path that are not UTF-8 become \\xNN."""

    time: float
    who: str
    what: str
    path: str
    times: int


class MissedLine(Struct, frozen=True):
    """So many changes are not shown, as JSON."""

    missed: int


def follow(socket: Path, path: Path | None) -> Iterator[Changes]:
    """What the daemon at this socket tells, for ever.

    Args:
        socket: the daemon's control socket.
        path: tell only what happens there or below it, None for everything.

    Raises:
        UserError: the daemon is not there, refuses, or has gone.
    """
    wanted = b"" if path is None else os.fsencode(os.path.realpath(path))
    if len(wanted) > MAX_PATH:
        raise UserError(f"a path of {len(wanted)} bytes: name one of {MAX_PATH} at most")
    with connected(socket) as connection:
        ask(connection, Subscribe(wanted), Subscribed)
        connection.settimeout(None)
        while True:
            message, _ = connection.receive()
            if not isinstance(message, Changes):
                raise Dropped(f"an unexpected message: {type(message).__name__}")
            yield message


def lines(changes: Changes) -> list[str]:
    """What to print for people."""
    shown = [_line(change) for change in changes.changes]
    if changes.missed:
        shown.append(f"{changes.missed} changes not shown: they came faster than they could be printed")
    return shown


def json_lines(changes: Changes) -> list[str]:
    """What to print for programs: a JSON object a line."""
    shown: list[ChangeLine | MissedLine] = [
        ChangeLine(change.time, change.who, change.what, change.path.decode("utf-8", "backslashreplace"), change.times)
        for change in changes.changes
    ]
    if changes.missed:
        shown.append(MissedLine(changes.missed))
    return [msgspec.json.encode(one).decode() for one in shown]


def _line(change: Change) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(change.time)) + f".{int(change.time * 1000) % 1000:03d}"
    times = f" (x{change.times})" if change.times > 1 else ""
    return f"{clock}  {change.who:<12}  {change.what:<9}  {printable(change.path)}{times}"


def printable(path: bytes) -> str:
    """A path that does nothing to a terminal, whatever a guest calls its files."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
