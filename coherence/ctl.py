"""coherencectl: the command that looks at a running coherenced, or at a table file."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from coherence.connection import Connection, Dropped
from coherence.errors import UserError
from coherence.messages import (
    DAEMON_DECODER,
    PROTOCOL,
    Backend,
    FromDaemon,
    Hello,
    Refused,
    Status,
    StatusPage,
    StatusQuestion,
    Watching,
    Welcome,
)
from coherence.parser import Parser
from coherence.places import Places, socket_of
from coherence.table import ABI_VERSION, TRUST_NOTHING, Table

ANSWER_SECONDS = 5.0

Expected = TypeVar("Expected")

EPILOG = """\
  coherencectl status                  the daemon of table /vt
  coherencectl status --json | jq .    the same, for programs
  coherencectl check /dev/shm/vt       is this file a sound table?

Exit status: 0 all is well, 1 failure (no daemon, not permitted, a bad table), 2 on wrong usage.
"""


class Report(msgspec.Struct, frozen=True):
    """What status prints as JSON."""

    status: Status
    backends: list[Backend]


def fetch_status(path: Path) -> Report:
    """Ask the daemon at this socket for its status. UserError when it cannot be had."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(ANSWER_SECONDS)
    connection: Connection[FromDaemon] = Connection(sock, DAEMON_DECODER)
    backends: list[Backend] = []
    try:
        sock.connect(str(path))
        _ask(connection, Hello(PROTOCOL, "control"), Welcome)
        first: int | None = 0
        while first is not None:
            page = _ask(connection, StatusQuestion(first), StatusPage)
            backends += page.backends
            first = page.next
    except PermissionError:
        raise UserError(f"{path}: not permitted: run this as root or in the socket's group") from None
    except TimeoutError:
        raise UserError(f"coherenced at {path} does not answer: restart it") from None
    except Dropped as error:
        raise UserError(f"coherenced at {path} ended the connection: {error}: see its log") from None
    except OSError:
        raise UserError(f"no coherenced at {path}: start it, or name its --socket") from None
    finally:
        connection.close()
    return Report(page.status, backends)


def _ask(connection: Connection[FromDaemon], question: Hello | StatusQuestion, answer: type[Expected]) -> Expected:
    connection.send(question)
    message, _ = connection.receive()
    if isinstance(message, Refused):
        raise UserError(message.reason)
    if not isinstance(message, answer):
        raise Dropped(f"an unexpected message: {type(message).__name__}")
    return message


def render(report: Report) -> str:
    """The report for people."""
    status = report.status
    missing = ", ".join(map(str, status.missing))
    trust = "trusted" if status.trusted else f"not trusted, waiting for the backends with pid {missing}"
    lines = [
        f"table     {status.table}, {status.slots} slots, {trust}",
        f"domain    {status.domain}",
        f"daemon    pid {status.pid}, up {status.seconds:.0f} s",
        f"sequence  {status.sequence}, {status.bumps_per_second:.0f} bumps/s",
        f"floor     {'trust nothing' if status.floor == TRUST_NOTHING else status.floor}, "
        f"raised {status.floor_raises} times, distrusted {status.distrusts} times",
        f"roots     {status.roots}",
        f"watch     {watching(status.watch)}",
        f"DAX       {', '.join(status.dax) or 'none'}",
        f"backends  {len(report.backends)}",
    ]
    for backend in report.backends:
        counters = backend.counters
        told = "no answer" if counters is None else ", ".join(f"{k} {v}" for k, v in counters.items())
        lines.append(
            f"  {backend.guest}: pid {backend.pid}, cache {backend.cache}, "
            f"root {backend.device}:{backend.inode}, up {backend.seconds:.0f} s{', ' if told else ''}{told}"
        )
    return "\n".join(lines)


def watching(watch: Watching) -> str:
    """The host watch for people."""
    told = f"{watch.kind}, {watch.watches} of {watch.limit} watches"
    if watch.refused:
        told += f", {watch.refused} refused"
    if watch.overflows:
        told += f", {watch.overflows} overflows"
    return f"{told}, {watch.events} changes: {watch.bumped} bumped, {watch.own} of backends"


def check(path: str) -> str:
    """Validate a table file; returns one line about it. UserError says what is wrong with it."""
    table = Table.open(path)
    try:
        faults = []
        if above := table.slots_above_sequence():
            faults.append(f"{above} slots are above the sequence")
        if TRUST_NOTHING != table.floor > table.sequence:
            faults.append("the floor is above the sequence")
        if any(root >= table.slot_count for root in table.roots):
            faults.append("a root slot does not exist")
        if faults:
            raise UserError(f"{path}: {', '.join(faults)}: stop all that uses it and remove it")
        return (
            f"{path}: sound: ABI {ABI_VERSION}, {table.slot_count} slots, sequence {table.sequence}, "
            f"{len(table.roots)} roots, domain {table.domain.hex()}"
        )
    finally:
        table.close()


def _parser() -> Parser:
    parser = Parser(
        prog="coherencectl",
        description="Look at a running coherenced, or at a version table.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="show table, backends, bumps a second, floor raises, DAX use")
    status.add_argument("--table", metavar="NAME", default="/vt", help="shared memory name (default /vt)")
    status.add_argument("--socket", metavar="PATH", help="control socket (default: the one of the table)")
    status.add_argument("--json", action="store_true", help="print JSON")
    table = commands.add_parser("check", help="validate a table file")
    table.add_argument("file", metavar="FILE", help="a path such as /dev/shm/vt, or a shared memory name")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run coherencectl with these arguments (the process's own by default); returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "check":
            print(check(options.file))
        else:
            report = fetch_status(Path(options.socket or socket_of(str(Places(options.table).table))))
            as_json = msgspec.json.format(msgspec.json.encode(report)).decode()
            print(as_json if options.json else render(report))
    except UserError as error:
        print(f"coherencectl: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
