"""Where rounds take place on the host: a directory for each round of each test, with what the test needs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.litmus.litmus import Litmus, number_in, shown

OLD_MTIME = 1_000_000_000
"""Modification time of the files, in seconds: `modified` tells whether a file has another."""


def place(root: Path, test: Litmus, round_: int) -> Path:
    """The directory of a round."""
    return root / test.name / f"{round_:05}"


def prepare(root: Path, test: Litmus, rounds: int) -> None:
    """Make the directories of all rounds of a test."""
    for round_ in range(rounds):
        directory = place(root, test, round_)
        directory.mkdir(parents=True)
        for line in test.setup:
            what, first, *rest = line.split()
            if what == "dir":
                (directory / first).mkdir()
            elif what == "file":
                (directory / first).write_text(rest[0])
                os.utime(directory / first, (OLD_MTIME, OLD_MTIME))
            elif what == "link":
                (directory / rest[0]).hardlink_to(directory / first)
            else:
                (directory / rest[0]).symlink_to(first)


def final(root: Path, test: Litmus, round_: int) -> str:
    """What the host finds when a round is over: the values of the test's final operations."""
    found = []
    for step in test.final:
        name, file = step.split()
        try:
            value = _FINAL[name](place(root, test, round_) / file)
        except OSError as error:
            value = -(error.errno or errno.EIO)
        found.append(shown(value))
    return " ".join(found)


def remove(root: Path, test: Litmus) -> None:
    """Remove all directories of a test."""
    shutil.rmtree(root / test.name)


_FINAL: dict[str, Callable[[Path], int]] = {
    "read": lambda path: number_in(path.read_bytes()),
    "size": lambda path: path.stat().st_size,
    "exists": lambda path: int(path.exists()),
}
