"""Players that run programs/litmus: stock guests, and the host itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab import assets
from tests.lab.guest import Guest
from tests.litmus.run import Run
from tests.litmus.side_channel import BYTES, DEVICE

PROGRAM = Path(__file__).with_name("programs") / "litmus"
TIMEOUT = 1800.0
"""Seconds for a whole run; each round has its own time limit."""


class Stock:
    """A guest with a stock kernel, which has the share of each mode mounted at /mnt/MODE."""

    def __init__(self, kind: str, vm: Guest) -> None:
        self._kind = kind
        self._vm = vm
        vm.put_file("/litmus", assets.compile_static(PROGRAM).read_bytes())

    def play(self, run: Run, number: int) -> None:
        """As Player.play()."""
        words = _arguments(run, number, DEVICE[self._kind], f"/mnt/{run.mode}/{run.folder}")
        self._vm.check(f"exec /litmus {' '.join(words)}", stdin=_script(run, number), timeout=TIMEOUT)


class Host:
    """The host, on the directory itself.

    Args:
        root: the directory of each mode is in here.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def play(self, run: Run, number: int) -> None:
        """As Player.play()."""
        words = _arguments(run, number, str(run.side.path), str(self._root / run.mode / run.folder))
        program = str(assets.compile_static(PROGRAM))
        subprocess.run([program, *words], input=_script(run, number), timeout=TIMEOUT, check=True)


def _arguments(run: Run, number: int, side_channel: str, root: str) -> list[str]:
    numbers = (number, run.lanes, run.settle_ms, run.seed)
    return [side_channel, str(BYTES), root, *map(str, numbers)]


def _script(run: Run, number: int) -> bytes:
    lines = []
    for position, test in enumerate(run.tests):
        part = run.part(test, number)
        lines.append(f"test {test.name} {position * run.rounds} {run.rounds} {len(test.parties)}")
        lines += [f"warm {step}" for step in part.warm]
        lines += [f"do {step}" for step in part.steps]
    return "".join(f"{line}\n" for line in lines).encode()
