"""Programs in two real guests on QEMU 11.1 that map files: random changes against a model, SQLite used by both."""

from __future__ import annotations

import json
import mmap
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.lab import assets, backends
from tests.lab.guest import Guest, boot
from tests.lab.paths import LabError
from tests.vm.dax_place import dax_place

PROGRAMS = Path(__file__).with_name("programs")
LEASE_MAX = 0.5
MOST_BYTES = 7_000_000
SECONDS = 60.0
HOST, FIRST = 2, 4
"""Turns of programs/ledger: the one of the host, and that of the first transaction."""
LONG = pytest.mark.timeout(3600)
STEPS = int(os.environ.get("DAX_STEPS", "10000"))
"""Of the long random tests."""


@dataclass(frozen=True)
class Machines:
    """Two guests that share a directory.

    Attributes:
        share: the directory on the host.
        first: has it at /always and /inode, mounted so, and at /never, where its backend has no window.
        second: has it at /always.
        control: coherenced's socket.
    """

    share: Path
    first: Guest
    second: Guest
    control: Path


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    try:
        ledger = assets.compile_static(PROGRAMS / "ledger", assets.sqlite())
    except LabError as error:
        pytest.skip(str(error))
    with dax_place() as place, ExitStack() as stack:
        daemon = stack.enter_context(backends.daemon(place.folder, place.table))
        guests = []
        for number, tags in enumerate((("always", "inode", "never"), ("always",))):
            shares = {}
            for tag in tags:
                run_dir = place.folder / f"{number}{tag}"
                run_dir.mkdir()
                options = place.coherence(daemon)
                options += ["--guest", f"{tag}{number}", "--lease-max", str(LEASE_MAX)]
                if tag != "never":
                    options += ["--dax", "always", "--dax-window", "16M"]
                backend = backends.ours(place.share, run_dir, cache="shared", tag=tag, options=options)
                shares[tag] = stack.enter_context(backend).socket
            vm = stack.enter_context(boot("qemu-dax", shares=shares))
            for tag in tags:
                vm.mount(tag, f"/{tag}", f"dax={tag}")
            vm.put_file("/random_io", assets.compile_static(PROGRAMS / "random_io").read_bytes())
            vm.put_file("/ledger", ledger.read_bytes())
            guests.append(vm)
        yield Machines(place.share, guests[0], guests[1], daemon.socket)


class Turn:
    """The word that says whose turn it is, in a file that guests have mapped, too."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._word = memoryview(self._page).cast("I")

    @property
    def value(self) -> int:
        return self._word[0]

    @value.setter
    def value(self, turn: int) -> None:
        self._word[0] = turn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._word.release()
        self._page.close()


@pytest.mark.parametrize("steps", [300, pytest.param(STEPS, marks=[pytest.mark.slow, LONG])])
@pytest.mark.parametrize(
    "mounts",
    [
        ("always",),
        ("inode",),
        pytest.param(("never",), marks=[pytest.mark.slow, LONG]),
        pytest.param(("inode", "always"), marks=[pytest.mark.slow, LONG]),
    ],
)
def test_random_changes_are_as_in_a_model(machines: Machines, mounts: tuple[str, ...], steps: int) -> None:
    """Of one file by one mount, or by two that know nothing of each other; the other guest reads along."""
    name = f"random-{'-'.join(mounts)}-{steps}"
    (machines.share / name).touch()
    paths = " ".join(f"/{mount}/{name}" for mount in mounts)
    with ThreadPoolExecutor() as pool:
        words = f"/random_io read 1 {steps * 2} {MOST_BYTES} /always/{name}"
        reader = pool.submit(machines.second.check, words, timeout=SECONDS + steps)
        machines.first.check(f"/random_io write {len(name)} {steps} {MOST_BYTES} {paths}", timeout=SECONDS + steps)
        reader.result()


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=[pytest.mark.slow, LONG])])
def test_sqlite_in_wal_mode_used_by_two_guests(machines: Machines, count: int) -> None:
    """In turns, as each guest has locks of its own; what is committed they know by the -shm file that both map."""
    folder = machines.share / f"ledger-{count}"
    folder.mkdir()
    with ThreadPoolExecutor() as pool, Turn(folder / "turn") as turn:
        ends = [
            pool.submit(vm.check, f"/ledger /always/{folder.name} {number} {count}", timeout=SECONDS + count / 5)
            for number, vm in enumerate((machines.first, machines.second))
        ]
        deadline = time.monotonic() + SECONDS
        while turn.value < HOST and time.monotonic() < deadline and not any(end.done() for end in ends):
            time.sleep(0.01)
        mapped = windows_that_map(machines.control, folder / "ledger.db-shm")
        turn.value = FIRST
        for end in ends:
            end.result()
        assert turn.value == FIRST + 2 * count + 2
    assert mapped == 2
    with closing(sqlite3.connect(folder / "ledger.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = database.execute("SELECT who, count(*), count(DISTINCT turn) FROM ledger GROUP BY who").fetchall()
    assert rows == [(0, count, count), (1, count, count)]


def windows_that_map(control: Path, path: Path) -> int:
    """How many windows have a file mapped."""
    command = [backends.console_script("coherencectl"), "dax", "--json", "--files", "50", "--socket", str(control)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    wanted = path.stat()
    for file in report["files"]:
        if (file["device"], file["inode"]) == (wanted.st_dev, wanted.st_ino):
            return int(file["windows"])
    return 0
