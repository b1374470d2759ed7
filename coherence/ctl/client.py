"""A control client of coherenced."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.protocol.connection import Connection, Dropped
from coherent_vfs.coherence.protocol.messages import (
    DAEMON_DECODER,
    PROTOCOL,
    Backend,
    DaxPage,
    DaxQuestion,
    DaxUse,
    FileUse,
    FromDaemon,
    Hello,
    Refused,
    Status,
    StatusPage,
    StatusQuestion,
    Subscribe,
    Welcome,
    WindowUse,
)

ANSWER_SECONDS = 5.0

Expected = TypeVar("Expected")


class Report(Struct, frozen=True):
    """The status with all backends."""

    status: Status
    backends: list[Backend]


class DaxReport(Struct, frozen=True):
    """All DAX windows, and the files of which most is mapped in them."""

    use: DaxUse
    windows: list[WindowUse]
    files: list[FileUse]


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Connection[FromDaemon]]:
    """A connection to the daemon at this socket, after the greeting.

    Raises:
        UserError: there is none, or it ends or does not answer within the context.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(ANSWER_SECONDS)
    connection: Connection[FromDaemon] = Connection(sock, DAEMON_DECODER)
    try:
        _connect(sock, path)
        ask(connection, Hello(PROTOCOL, "control"), Welcome)
        yield connection
    except TimeoutError:
        raise UserError(f"coherenced at {path} does not answer: restart it") from None
    except Dropped as error:
        raise UserError(f"coherenced at {path} ended the connection: {error}: see its log") from None
    finally:
        connection.close()


def ask(
    connection: Connection[FromDaemon],
    question: Hello | StatusQuestion | DaxQuestion | Subscribe,
    answer: type[Expected],
) -> Expected:
    """Send a message; returns its answer, which must be of this type.

    Raises:
        UserError: the daemon refuses.
        Dropped: it is gone, or answers something else.
        TimeoutError: it does not answer.
    """
    connection.send(question)
    message, _ = connection.receive()
    if isinstance(message, Refused):
        raise UserError(message.reason)
    if not isinstance(message, answer):
        raise Dropped(f"an unexpected message: {type(message).__name__}")
    return message


def fetch_status(path: Path) -> Report:
    """Ask the daemon at this socket for its status. UserError when it cannot be had."""
    backends: list[Backend] = []
    first: int | None = 0
    with connected(path) as connection:
        while first is not None:
            page = ask(connection, StatusQuestion(first), StatusPage)
            backends += page.backends
            first = page.next
    return Report(page.status, backends)


def fetch_dax(path: Path, files: int) -> DaxReport:
    """Ask the daemon at this socket for all DAX windows and so many files. UserError when it cannot be had."""
    with connected(path) as connection:
        page = ask(connection, DaxQuestion(0, files), DaxPage)
        report = DaxReport(page.use, page.windows, page.files)
        while page.next is not None:
            page = ask(connection, DaxQuestion(page.next, 0), DaxPage)
            report.windows.extend(page.windows)
    return report


def _connect(sock: socket.socket, path: Path) -> None:
    try:
        sock.connect(str(path))
    except PermissionError:
        raise UserError(f"{path}: not permitted: run this as root or in the socket's group") from None
    except TimeoutError:
        raise
    except OSError:
        raise UserError(f"no coherenced at {path}: start it, or name its --socket") from None
