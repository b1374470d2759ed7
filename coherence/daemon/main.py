"""coherenced: the command."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from coherent_vfs.coherence.common import log
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.parser import Parser, PrintVersion
from coherent_vfs.coherence.common.sd_notify import Notifier
from coherent_vfs.coherence.daemon.config import Config, load
from coherent_vfs.coherence.daemon.service import Service
from coherent_vfs.coherence.daemon.watch.host_watch import Kind
from coherent_vfs.coherence.daemon.watch.selector import FirstSelector

EPILOG = """\
One coherenced serves one version table, and so one domain: the guests, backends and host watches that must
agree about one set of files. Start it before the backends; it may be restarted, or killed, at any time:
guests then ask for everything until it is back.

  coherenced                                   table vt, socket /run/coherenced/vt.sock
  coherenced --table blue --slots 65536        a second domain
  coherenced --config /etc/coherenced.toml     settings from a file; flags overrule it
  kill -HUP PID                                read the file again: logging, socket mode and group

Exit status: 0 after SIGTERM, 1 on failure, 2 on wrong usage.
"""


def _parser() -> Parser:
    parser = Parser(
        prog="coherenced",
        description="Keep the caches of many virtual machines that share directories coherent.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, default=None, help="settings, TOML")
    parser.add_argument("--table", metavar="NAME", help="name of the table (default vt), the file /dev/shm/NAME")
    parser.add_argument("--slots", metavar="N", type=int, help="slots of a new table, a power of two (default 1048576)")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="control socket (default /run/coherenced/NAME.sock, for ordinary users "
        "$XDG_RUNTIME_DIR/coherenced/NAME.sock)",
    )
    parser.add_argument("--socket-mode", metavar="OCTAL", help="its permission bits (default 0660)")
    parser.add_argument(
        "--socket-group",
        metavar="GROUP",
        help="group that may connect, and read the table (default: its own)",
    )
    parser.add_argument(
        "--dax-window", metavar="SIZE", help="largest DAX window that a guest may have: 512M, 64G (default 64G)"
    )
    parser.add_argument("--dax-total", metavar="SIZE", help="how large all DAX windows together may be (default 256G)")
    parser.add_argument("--watch", choices=get_args(Kind), help="how to see changes on the host (default inotify)")
    parser.add_argument(
        "--max-watches",
        metavar="N",
        type=int,
        help="watch so many directories at most; guests do not cache the others (default: what the system allows)",
    )
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="run before ordinary processes (SCHED_FIFO), so that changes on the host are seen soon on a busy one; "
        "needs CAP_SYS_NICE or a limit of RLIMIT_RTPRIO",
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS",
        help="serve Prometheus metrics over HTTP there: 127.0.0.1:9999, [::1]:9999 or a Unix socket's path "
        "(default: nowhere)",
    )
    parser.add_argument("--log-level", choices=list(log.LEVELS), help="least severe level to log (default warn)")
    parser.add_argument("--log-json", action="store_true", help="log JSON objects instead of text")
    parser.add_argument("--version", action=PrintVersion)
    return parser


def _run_first() -> None:
    try:
        # The lowest realtime priority: before all ordinary processes, and after whatever else is realtime.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(os.sched_get_priority_min(os.SCHED_FIFO)))
    except OSError as error:
        log.get_logger(__name__).warning(
            "not realtime: give CAP_SYS_NICE or LimitRTPRIO=1, or leave --realtime out", reason=error.strerror
        )


def _reload(path: Path | None, flags: dict[str, Any], old: Config, service: Service, notifier: Notifier) -> None:
    notifier.reloading()
    try:
        config = load(path, flags)
        names = "table", "slots", "socket", "dax_window", "dax_total", "watch", "max_watches", "realtime", "metrics"
        fixed = [name for name in names if getattr(config, name) != getattr(old, name)]
        log.configure(config.log_level, json=config.log_json)
        service.permit_socket(config.socket_bits, config.socket_group)
        if fixed:
            log.get_logger(__name__).warning("takes effect after a restart only", settings=fixed)
        log.get_logger(__name__).info("reloaded")
    except UserError as error:
        log.get_logger(__name__).error("not reloaded", reason=str(error))
    notifier.ready(f"Table {old.table}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run coherenced with these arguments (the process's own by default); returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    path: Path | None = options.pop("config")
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    try:
        load(None, flags)
    except UserError as error:
        parser.error(str(error))
    try:
        config = load(path, flags)
        log.configure(config.log_level, json=config.log_json)
        if config.realtime:
            _run_first()
        notifier = Notifier()
        with Service(
            config.paths,
            config.slots,
            config.socket_path,
            config.socket_bits,
            config.socket_group,
            config.watch,
            config.max_watches,
            config.metrics_address,
            config.dax_limits,
        ) as service:
            first = service.watch.first
            selector = None if first is None else FirstSelector(*first)
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
                runner.run(service.run(notifier, lambda: _reload(path, flags, config, service, notifier)))
    except UserError as error:
        print(f"coherenced: {error}", file=sys.stderr)
        return 1
    except Exception:
        log.get_logger(__name__).exception("an error that was not expected: please report it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
