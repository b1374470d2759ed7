"""python -m demo: coherenced, two guests with a backend for each cache mode, one directory."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.guest.guest import Guest as UserSpaceGuest
from demo.account import Stage, perform
from demo.viewers import Embedded, Host, Stock, Viewer
from tests.lab import backends, setup
from tests.lab.guest import GuestError, boot
from tests.lab.paths import LabError

MODES = ("none", "auto", "always", "shared")


def say(line: str) -> None:
    print(line, flush=True)


class Demo:
    """The daemon, the shared directory, and a backend for each guest and mode."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir()
        # By the time that somebody looks at it, it is old enough for a lease.
        (self.share / "quiet").write_text("as it was")
        paths = DomainPaths(f"vt-demo-{os.getpid()}-{secrets.token_hex(4)}")
        self.table = paths.name
        for path in (paths.table, paths.leases, paths.lock):
            stack.callback(path.unlink, missing_ok=True)
        self.daemon = stack.enter_context(backends.daemon(folder, self.table))
        self._stack = stack

    def backend(self, guest: int, mode: str, purpose: str = "") -> Path:
        """Start the backend of a guest for a mode; its socket."""
        folder = self.folder / f"{purpose}guest{guest}"
        folder.mkdir(exist_ok=True)
        options = ["--coherence", self.table, "--coherence-socket", str(self.daemon.socket)]
        options += ["--guest", f"{purpose}guest{guest}-{mode}"]
        served = backends.ours(self.share, folder, cache=mode, tag=mode, options=options)
        return self._stack.enter_context(served).socket

    def stage(self, title: str, name: str, guests: tuple[Viewer, Viewer]) -> Stage:
        """A stage whose second guest is served by the backend of this name."""
        return Stage(title, *guests, Host(self.share), lambda: self._requests(name))

    def _requests(self, name: str) -> int:
        """How many requests a backend has served, once it answers as soon as coherenced wants it to."""
        counters = None
        while counters is None:
            backend = next(b for b in self._backends() if b["guest"] == name)
            counters = backend["counters"]
        return int(counters["requests"])

    def _backends(self) -> list[dict[str, Any]]:
        status = subprocess.run(
            [
                backends.console_script("coherencectl"),
                "status",
                "--json",
                "--socket",
                str(self.daemon.socket),
            ],
            check=True,
            capture_output=True,
        )
        shown: list[dict[str, Any]] = json.loads(status.stdout)["backends"]
        return shown


def stock_stages(demo: Demo, stack: ExitStack) -> list[Stage]:
    """Boot two virtual machines which mount the directory once in each mode."""
    setup.light()
    machines = []
    for number in (1, 2):
        started = time.monotonic()
        shares = {mode: demo.backend(number, mode) for mode in MODES}
        machine = stack.enter_context(boot("qemu", shares=shares))
        for mode in MODES:
            machine.mount(mode, f"/mnt/{mode}")
        release = machine.check("uname -r").decode().strip()
        say(f"guest {number}: Linux {release} under QEMU, mounted after {time.monotonic() - started:.1f} s")
        machines.append(machine)
    return [
        demo.stage(
            f"{mode:<8} guests with a stock kernel",
            f"guest2-{mode}",
            (Stock("guest 1", machines[0], f"/mnt/{mode}"), Stock("guest 2", machines[1], f"/mnt/{mode}")),
        )
        for mode in MODES
    ]


def embedded_stages(demo: Demo, stack: ExitStack, modes: Sequence[str]) -> list[Stage]:
    """Start two user-space guests for each mode; in shared they check the version table."""

    def guest(number: int, mode: str) -> Viewer:
        socket = demo.backend(number, mode, "embedded-")
        table = demo.table if mode == "shared" else None
        return Embedded(f"guest {number}", stack.enter_context(UserSpaceGuest.connect(socket, table=table)))

    return [
        demo.stage(
            f"{mode:<8} " + ("guests that check the version table" if mode == "shared" else "embedded guests"),
            f"embedded-guest2-{mode}",
            (guest(1, mode), guest(2, mode)),
        )
        for mode in modes
    ]


def run(embedded: bool) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfs-demo-")))
        demo = Demo(folder, stack)
        say(f"One directory, one coherenced (table {demo.table}), two guests with a backend for each mode.")
        stages: list[Stage] = []
        if not embedded:
            try:
                stages = stock_stages(demo, stack)
            except (LabError, GuestError, OSError) as error:
                say(f"No QEMU guests ({str(error).splitlines()[0]}): embedded user-space guests take their place.")
        stages += embedded_stages(demo, stack, ("shared",) if stages else MODES)
        for stage in stages:
            perform(stage, say)
        say(
            "\nIn shared, a stock kernel has leases: it keeps what has not changed lately for up to a second, and who"
            "\nchanges it waits for that, so a guest is never wrong. Guests that check the table keep all that they"
            "\nknow, nobody waits for them, and they ask only for what changed. Changes on the host itself are seen"
            "\nby coherenced: at once by guests that check the table, by a stock kernel when its lease is over."
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--embedded", action="store_true", help="without QEMU: user-space guests only")
    options = parser.parse_args()
    try:
        run(options.embedded)
    except (UserError, LabError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
