"""The command line of vfs-backend; docs/reference/vfs-backend.md explains every option."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, get_args

import msgspec
from msgspec import structs

from coherent_vfs.coherence.common import log
from coherent_vfs.coherence.common.parser import Parser, PrintVersion
from coherent_vfs.coherence.common.sizes import parse_size, size_text
from coherent_vfs.coherence.protocol.constants import CHUNK, LABEL_MAX
from coherent_vfs.coherence.shm.paths import table_path
from coherent_vfs.server.caching.policy import AUTO_TIMEOUT, CACHE_MODES, LONG_TIMEOUT
from coherent_vfs.server.settings import DAX_MIN_SIZE, DAX_WINDOW, LEASE_MARGIN, LEASE_MAX, TAG_MAX, DaxMode, Settings
from coherent_vfs.server.virtio.virtqueue import MAX_QUEUE_SIZE

PROG: Final = "vfs-backend"
LEASE_LIMIT: Final = 10.0
"""Seconds; all changes of what is leased wait so long at most."""
CAPABILITIES: Final = {"type": "fs", "features": ["separate-options"]}
"""What management tools such as libvirt ask for (QEMU's docs/interop/vhost-user.json)."""

EPILOG: Final = """\
Examples:
  vfs-backend --shared-dir /srv/data --socket-path /run/data.sock
      share a directory with one guest, as virtiofsd does
  vfs-backend --shared-dir /srv/data --socket-path /run/a.sock --cache shared --coherence vt
      the same, cached as long as it is fresh: needs coherenced, and one vfs-backend for each guest

In QEMU:  -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem
          -chardev socket,id=c,path=/run/data.sock -device vhost-user-fs-pci,chardev=c,tag=data
In the guest:  mount -t virtiofs data /mnt

Exit status: 0 after SIGTERM, SIGINT or SIGHUP, 1 on failure, 2 on wrong usage.
"""

# What the option -o of the old C virtiofsd becomes. Locks are the guest's own in any case.
_LEGACY_VALUES: Final = {
    "source": "--shared-dir",
    "cache": "--cache",
    "timeout": "--timeout",
    "log_level": "--log-level",
    "loglevel": "--log-level",
}
_LEGACY_FLAGS: Final[dict[str, list[str]]] = {
    "xattr": ["--xattr"],
    "no_xattr": [],
    "writeback": ["--writeback"],
    "no_writeback": [],
    "readdirplus": [],
    "no_readdirplus": ["--no-readdirplus"],
    "allow_direct_io": ["--allow-direct-io"],
    "no_allow_direct_io": [],
    "no_posix_lock": [],
    "no_flock": [],
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, checked.

    Attributes:
        share: what is shared and how; without the descriptor, which is not open yet.
        socket_path: where to listen, or None with `fd`.
        fd: descriptor of a socket that listens already.
        socket_group: group that may connect.
        coherence: path of the domain's version table, or None.
        coherence_socket: of coherenced, or None for the one that belongs to the table.
        guest: what status displays call the guest.
        rlimit_nofile: limit of open files; 0 leaves it, None is as high as useful.
        exit_on_disconnect: end with the first front-end.
        log_level, log_json: see coherence.common.log.configure.
    """

    share: Settings
    socket_path: Path | None
    fd: int | None
    socket_group: str | None
    coherence: Path | None
    coherence_socket: Path | None
    guest: str
    rlimit_nofile: int | None
    exit_on_disconnect: bool
    log_level: str
    log_json: bool

    def settings(self, root_fd: int, *, dax: bool = True) -> Settings:
        """What the device needs of it.

        Args:
            root_fd: see Settings.
            dax: whether the guest can have a window.
        """
        window_bytes = self.share.window_bytes if dax and self.share.dax != "never" else 0
        return structs.replace(self.share, root_fd=root_fd, window_bytes=window_bytes)


def parse(argv: Sequence[str]) -> Options:
    """Read the command line; exits with status 2 and one line on stderr when it is wrong."""
    parser = _parser()
    try:
        given = vars(parser.parse_args(list(_modern(argv))))
    except ValueError as error:
        parser.error(str(error))
    if given["guest"] is None:
        socket_path = given["socket_path"]
        given["guest"] = (given["tag"] or (socket_path.name if socket_path else "guest"))[:LABEL_MAX]
    problem = _problem(given)
    if problem:
        parser.error(problem)
    # Entries that a guest may not keep are not worth looking up for it.
    given["readdirplus"] &= given["cache"] != "none"
    share = {name: given.pop(name) for name in Settings.__struct_fields__ if name in given}
    return Options(share=Settings(root_fd=-1, **share), **given)


def _modern(argv: Sequence[str]) -> Iterator[str]:
    """The command line with -o of the old virtiofsd replaced by the options of today.

    Raises:
        ValueError: -o names something that has no counterpart.
    """
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("-o"):
            yield argument
            continue
        for item in (argument[2:] or next(arguments, "")).split(","):
            name, equals, value = item.partition("=")
            if equals and name in _LEGACY_VALUES:
                yield f"{_LEGACY_VALUES[name]}={value}"
            elif not equals and name in _LEGACY_FLAGS:
                yield from _LEGACY_FLAGS[name]
            else:
                raise ValueError(f"argument -o: {item!r} is not supported")


def _problem(given: dict[str, Any]) -> str | None:
    """What is wrong with options that are right one by one."""
    cache = given["cache"]
    if given["shared_dir"] is None:
        return "--shared-dir DIR is missing: name the directory to share"
    if (given["socket_path"] is None) == (given["fd"] is None):
        return "give either --socket-path PATH or --fd FD: where the virtual machine connects"
    if given["socket_group"] is not None and given["fd"] is not None:
        return "--socket-group needs --socket-path: a socket given by --fd has its group"
    if given["guest"] == "host":
        return "the guest would be called host, as who changes things on the host is: choose another --guest LABEL"
    if given["timeout"] is not None and cache not in ("auto", "always"):
        return f"--timeout does not go with --cache {cache}: only auto and always go by time"
    if given["lease_margin"] > given["lease_max"] > 0:
        return "--lease-margin is longer than --lease-max: no lease would be left; --lease-max 0 gives none"
    if given["writeback"] and cache not in ("auto", "always"):
        return f"--writeback does not go with --cache {cache}: others do not see delayed writes"
    if cache == "shared" and given["coherence"] is None:
        return "--cache shared needs --coherence TABLE, such as vt, and coherenced running"
    if given["dax"] != "never" and given["coherence"] is None:
        return "--dax needs --coherence TABLE, such as vt, and coherenced running"
    if given["dax"] != "never" and given["writeback"]:
        return "--dax does not go with --writeback: such a guest takes no notice of what others cut off"
    if given["dax"] != "never" and given["readonly"]:
        return "--dax does not go with --readonly: a guest could store into what it has mapped"
    if given["coherence_socket"] is not None and given["coherence"] is None:
        return "--coherence-socket needs --coherence TABLE, such as vt"
    return None


class _PrintCapabilities(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(json.dumps(CAPABILITIES, indent=2))
        parser.exit()


def _cache(text: str) -> str:
    return "none" if text == "never" else text


def _seconds(text: str) -> float:
    value = float(text)
    if not (0 <= value <= LONG_TIMEOUT * 366 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r}: use seconds, 0 or more")
    return value


def _lease(text: str) -> float:
    value = float(text)
    if not 0 <= value <= LEASE_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r}: use 0 to {LEASE_LIMIT:g} seconds")
    return value


def _tag(text: str) -> str:
    if not 0 < len(os.fsencode(text)) <= TAG_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: use 1 to {TAG_MAX} bytes")
    return text


def _guest(text: str) -> str:
    if not (0 < len(text) <= LABEL_MAX and text.isprintable()):
        raise argparse.ArgumentTypeError(f"{text!r}: use 1 to {LABEL_MAX} printable characters")
    return text


def _number(text: str, least: int, most: int) -> int:
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number from {least} to {most}")
    return value


def _queues(text: str) -> int:
    return _number(text, 1, 64)


def _queue_size(text: str) -> int:
    value = _number(text, 16, MAX_QUEUE_SIZE)
    if value & (value - 1):
        raise argparse.ArgumentTypeError(f"{text!r}: use a power of two")
    return value


def _descriptor(text: str) -> int:
    return _number(text, 0, (1 << 31) - 1)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _window(text: str) -> int:
    size = _size(text)
    if size < CHUNK or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text!r}: use a power of two from {size_text(CHUNK)}")
    return size


def _files(text: str) -> int:
    return _number(text, 0, 1 << 30)


for _type, _name in (
    (_seconds, "number of seconds"),
    (_lease, "number of seconds"),
    *((each, "number") for each in (_queues, _queue_size, _descriptor, _files)),
):
    _type.__name__ = _name  # as argparse calls it: "invalid number value: 'x'"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Serve a host directory to one virtual machine over virtio-fs (vhost-user).",
        epilog=EPILOG,
        usage=f"{PROG} --shared-dir DIR (--socket-path PATH | --fd FD) [OPTIONS]",
    )
    group = parser.add_argument_group("the share")
    group.add_argument("--shared-dir", metavar="DIR", type=Path, help="directory to share")
    group.add_argument("--tag", metavar="TAG", type=_tag, help="tag to offer; QEMU has its own option for it")
    group.add_argument("--readonly", action="store_true", help="refuse all changes")
    group.add_argument("--xattr", action="store_true", help="serve extended attributes")

    group = parser.add_argument_group("the virtual machine")
    group.add_argument("--socket-path", metavar="PATH", type=Path, help="socket to listen at")
    group.add_argument("--socket-group", metavar="GROUP", help="group that may connect (default: none)")
    group.add_argument("--fd", metavar="FD", type=_descriptor, help="inherited socket that listens already")
    group.add_argument("--exit-on-disconnect", action="store_true", help="end when the virtual machine disconnects")
    group.add_argument("--num-request-queues", metavar="N", type=_queues, default=1, help="request queues (default 1)")
    group.add_argument(
        "--queue-size", metavar="N", type=_queue_size, default=1024, help="queue size limit (default 1024)"
    )

    group = parser.add_argument_group("what the guest may cache")
    group.add_argument(
        "--cache",
        metavar="MODE",
        type=_cache,
        choices=CACHE_MODES,
        default="auto",
        help="none: nothing ('never' is the same); auto: names and attributes for a time, data while a file "
        "is open (default); always: everything; shared: everything until it changes, needs --coherence",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help=f"how long in auto and always (default {AUTO_TIMEOUT:.0f} and {LONG_TIMEOUT:.0f})",
    )
    group.add_argument(
        "--lease-max",
        metavar="SECONDS",
        type=_lease,
        default=LEASE_MAX,
        help=f"shared, stock guests: longest lease, the same for all guests (default {LEASE_MAX:g}; 0 gives none)",
    )
    group.add_argument(
        "--lease-margin",
        metavar="SECONDS",
        type=_lease,
        default=LEASE_MARGIN,
        help=f"shared: seconds of a lease that are for the way of the reply (default {LEASE_MARGIN:g})",
    )
    group.add_argument("--writeback", action="store_true", help="let the guest delay writes (auto, always)")
    group.add_argument("--no-readdirplus", dest="readdirplus", action="store_false", help="do not offer READDIRPLUS")
    group.add_argument(
        "--allow-mmap", action="store_true", help="let shared mappings keep data where the mode does not"
    )
    group.add_argument(
        "--allow-direct-io", action="store_true", help="pass O_DIRECT of the guest's programs on to the host"
    )

    group = parser.add_argument_group("file pages mapped in the guest (DAX)")
    group.add_argument(
        "--dax",
        metavar="WHICH",
        choices=get_args(DaxMode),
        default="never",
        help="which files a guest that mounts with dax=inode maps: never, always, inode (those with chattr +x), "
        "auto (by size); all but never give the guest a window (default never)",
    )
    group.add_argument(
        "--dax-window",
        dest="window_bytes",
        metavar="SIZE",
        type=_window,
        default=DAX_WINDOW,
        help=f"of the window, a power of two (default {size_text(DAX_WINDOW)}); the guest needs 1.6 %% of it as memory",
    )
    group.add_argument(
        "--dax-min-size",
        metavar="SIZE",
        type=_size,
        default=DAX_MIN_SIZE,
        help=f"smallest file for auto (default {size_text(DAX_MIN_SIZE)})",
    )

    group = parser.add_argument_group("the coherence domain")
    group.add_argument("--coherence", metavar="TABLE", type=table_path, help="version table to join, such as vt")
    group.add_argument(
        "--coherence-socket", metavar="PATH", type=Path, help="coherenced's socket (default: as coherenced's)"
    )
    group.add_argument("--guest", metavar="NAME", type=_guest, help="name in the status (default: the tag)")

    group = parser.add_argument_group("the process")
    group.add_argument(
        "--rlimit-nofile",
        metavar="N",
        type=_files,
        help="limit of open files; 0 leaves it (default: 1000000, or what is permitted)",
    )
    group.add_argument(
        "--log-level",
        choices=list(log.LEVELS),
        default="warn",
        help="least severe level (default warn); trace shows each request and its answer",
    )
    group.add_argument("--log-json", action="store_true", help="log JSON objects instead of text")
    group.add_argument(
        "--print-capabilities",
        action=_PrintCapabilities,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print what management tools ask for, JSON",
    )
    group.add_argument("--version", action=PrintVersion)
    return parser
