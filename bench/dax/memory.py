"""How much of the host's memory a file takes that several guests read."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.dax.stage import Stage, Way, open_stage

RESERVE = 192
"""Memory of a guest beside the file, MiB."""
MOST_WINDOW = 512
"""MiB: more chunks QEMU 11.1 does not bear."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """What reading took, in MiB.

    Attributes:
        cached: Page cache of the host, of the file.
        guests: More memory of the guests that has anything in it.
        mapped: Pages of files that the virtual machines have mapped more, one that n have mapped counts n times.
        shared: The same, but it counts once.
    """

    cached: float
    guests: float
    mapped: float
    shared: float


def measure(way: Way, size: int, count: int, cpu: str, say: Callable[[str], None]) -> Taken:
    """Let guests read all of a file, each with mmap(2), and go on having it open.

    Args:
        way: How they have it.
        size: Of the file, MiB; a power of two.
        count: How many guests.
        cpu: The processor that they share.
        say: Receives progress lines.
    """
    with open_stage([way], count, size + RESERVE, f"{min(size, MOST_WINDOW)}M", cpu, say) as stage:
        path = stage.file("file", size)
        _drop(path)
        before = _now(stage)
        for number, guest in enumerate(stage.guests):
            say(f"{way.title}: guest {number + 1} of {count} reads {size} MiB")
            # Without a program that has it open, Linux may forget the file at once, and what it has mapped.
            guest.check(f"sleep 3600 < /{way.name}/file >/dev/null 2>&1 &")
            guest.check(f"/io load seq 4096 0 /{way.name}/file", timeout=120)
        after = _now(stage)
        guests, mapped, shared = (now - then for now, then in zip(after, before, strict=True))
        return Taken(_cached(path), guests, mapped, shared)


def _drop(path: Path) -> None:
    """Take a file out of the host's page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _now(stage: Stage) -> tuple[float, float, float]:
    """Guest memory, mapped pages of files, and those by share, of all virtual machines, MiB."""
    pids = [guest.pid for guest in stage.guests]
    guests = sum(_field(pid, "smaps_rollup", "Pss_Shmem") for pid in [*pids, *(it.pid for it in stage.served)])
    mapped = sum(_field(pid, "status", "RssFile") for pid in pids)
    shared = sum(_field(pid, "smaps_rollup", "Pss_File") for pid in pids)
    return guests, mapped, shared


def _field(pid: int, file: str, name: str) -> float:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _cached(path: Path) -> float:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout) / (1 << 20)
