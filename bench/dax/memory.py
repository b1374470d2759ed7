"""How much of the host's memory a file takes that several guests read."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.dax.stage import Way, open_stage
from tests.lab.guest import Guest

RESERVE = 192
"""Memory of a guest beside the file, MiB."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """What reading took, in MiB.

    Attributes:
        host: Less free memory of the host.
        machines: More proportional set size of the virtual machines and their backends: a page that n of them map
            counts for each as 1/n.
        guests: Page cache of the guests.
    """

    host: float
    machines: float
    guests: float


def measure(way: Way, size: int, count: int, cpu: str, say: Callable[[str], None]) -> Taken:
    """Let guests read all of a file, each with mmap(2).

    Args:
        way: How they have it.
        size: Of the file, MiB; a power of two.
        count: How many guests.
        cpu: The processor that they share.
        say: Receives progress lines.
    """
    with open_stage([way], count, size + RESERVE, f"{size}M", cpu, say) as stage:
        path = stage.file("file", size)
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        pids = [*(guest.pid for guest in stage.guests), *(backend.pid for backend in stage.served)]
        before = _field("/proc/meminfo", "MemFree"), sum(map(_pss, pids)), _cached(stage.guests)
        for number, guest in enumerate(stage.guests):
            say(f"{way.title}: guest {number + 1} of {count} reads {size} MiB")
            guest.check(f"/io load seq 4096 0 /{way.name}/file", timeout=120)
        time.sleep(1)
        after = _field("/proc/meminfo", "MemFree"), sum(map(_pss, pids)), _cached(stage.guests)
    return Taken(before[0] - after[0], after[1] - before[1], after[2] - before[2])


def _pss(pid: int) -> float:
    return _field(f"/proc/{pid}/smaps_rollup", "Pss")


def _field(path: str, name: str) -> float:
    return _find(Path(path).read_text(), name)


def _find(text: str, name: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def _cached(guests: Sequence[Guest]) -> float:
    return sum(_find(guest.check("cat /proc/meminfo").decode(), "Cached") for guest in guests)
