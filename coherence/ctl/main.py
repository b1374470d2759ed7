"""coherencectl: the command that looks at a running coherenced, or at a table file."""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.parser import Parser, PrintVersion
from coherent_vfs.coherence.ctl import dax, top, watch
from coherent_vfs.coherence.ctl.check import check
from coherent_vfs.coherence.ctl.client import fetch_dax, fetch_status
from coherent_vfs.coherence.ctl.status import render
from coherent_vfs.coherence.protocol.messages import MAX_FILES
from coherent_vfs.coherence.shm.paths import DomainPaths, existing_socket_of

EPILOG = """\
  coherencectl status                  the daemon of table vt
  coherencectl status --json | jq .    the same, for programs
  coherencectl watch /srv/data         who changes what under this directory, as it happens
  coherencectl top                     which guest asks, changes and waits how often, each second
  coherencectl dax                     what guests have mapped in their DAX windows
  coherencectl check vt                is the file /dev/shm/vt a sound table?

Exit status: 0 all is well, 1 failure (no daemon, not permitted, a bad table), 2 on wrong usage.
"""

WATCH_EPILOG = """\
Each line says when, who (a guest's name, or "host"), what (create, modify, attrib, delete, move from, move to),
and where, as the path is on the host. "(x12)" stands for 12 equal changes that followed each other.

Only what happens in directories that coherenced watches is shown: those from which a guest with --cache shared
was served something that it may keep. Several writes to one file in a moment may be one change.
If they come faster than they are read, the daemon waits for nobody: the line "N changes not shown" says how
many were left out. End it with Ctrl-C.
"""

TOP_EPILOG = """\
For each guest: requests, changes that it made, those of them that had to wait for leases of others (held) and
leases that it was given, each per second; requests that wait now (parked); inodes that it knows and files that
it has open. KIND is aware for a guest that checks the table, stock for any other.

Who changes most comes first: each change makes the other guests fetch again what they had of the thing.
A raised floor makes all of them fetch everything again. "-": not known. End it with Ctrl-C.
"""

DAX_EPILOG = """\
A file is shown as DEVICE:INODE, as `stat -c %d:%i FILE` prints them; `find DIRECTORY -inum INODE` finds it.
REFUSED are claims that met a limit or had no room: the guest then gives up something older and tries again.
"""

# Home, and erase to the end: no flicker, as the lines that stay are written over.
HOME = "\x1b[H\x1b[J"


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("use 0.1 to 3600 seconds")
    return seconds


def _files(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_FILES:
        raise argparse.ArgumentTypeError(f"use 0 to {MAX_FILES}")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        prog="coherencectl",
        description="Look at a running coherenced, or at a version table.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action=PrintVersion)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    daemon = argparse.ArgumentParser(add_help=False)
    daemon.add_argument("--table", metavar="NAME", default="vt", help="name of the table (default vt)")
    daemon.add_argument("--socket", metavar="PATH", help="control socket (default: as coherenced's)")
    daemon.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, told: str, **settings: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.", **settings)

    add("status", "show table, backends, bumps a second, floor raises, DAX use", parents=[daemon])
    following = add("watch", "print changes as they happen", parents=[daemon], epilog=WATCH_EPILOG)
    following.add_argument("path", metavar="PATH-PREFIX", nargs="?", type=Path, help="only what happens there or below")
    rates = add("top", "show what each guest does, live", parents=[daemon], epilog=TOP_EPILOG)
    rates.add_argument(
        "--interval", metavar="S", type=_interval, default=1.0, help="seconds between two samples (default 1)"
    )
    rates.add_argument("--once", action="store_true", help="end after the first interval")
    mapped = add("dax", "show DAX windows, their use, and files by mapped size", parents=[daemon], epilog=DAX_EPILOG)
    mapped.add_argument(
        "--files", metavar="N", type=_files, default=10, help="those of which most is mapped (default 10)"
    )
    table = add("check", "validate a table file")
    table.add_argument("file", metavar="TABLE", help="its name, such as vt, or the path of a file, such as ./vt")
    return parser


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter flushes what is left when it ends, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"standard output: {error.strerror}: write elsewhere") from None


def _status(socket: Path, options: argparse.Namespace) -> None:
    report = fetch_status(socket)
    _show(msgspec.json.format(_json(report)) if options.json else render(report))


def _watch(socket: Path, options: argparse.Namespace) -> None:
    lines = watch.json_lines if options.json else watch.lines
    for changes in watch.follow(socket, options.path):
        _show("\n".join(lines(changes)))


def _top(socket: Path, options: argparse.Namespace) -> None:
    screen = sys.stdout.isatty() and not (options.json or options.once)
    for number, view in enumerate(top.views(socket, options.interval)):
        if options.json:
            _show(_json(view))
        elif screen:
            # The last line of the screen stays free, or it would scroll.
            _show(HOME + "\n".join(top.lines(view, shutil.get_terminal_size().lines - 1)))
        else:
            _show(("\n" if number else "") + "\n".join(top.lines(view)))
        if options.once:
            return


def _dax(socket: Path, options: argparse.Namespace) -> None:
    report = fetch_dax(socket, options.files)
    _show(msgspec.json.format(_json(report)) if options.json else dax.render(report))


DAEMON_COMMANDS = {"status": _status, "watch": _watch, "top": _top, "dax": _dax}


# They are ended so.
ENDLESS = ("watch", "top")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run coherencectl with these arguments (the process's own by default); returns the exit status."""
    options = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of guests and files may have letters that the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.command == "check":
            _show(check(options.file))
        else:
            socket = Path(options.socket or existing_socket_of(DomainPaths(options.table).name))
            DAEMON_COMMANDS[options.command](socket, options)
    except UserError as error:
        print(f"coherencectl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if options.command in ENDLESS else INTERRUPTED
    except BrokenPipeError:
        # Who read this has had enough.
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
