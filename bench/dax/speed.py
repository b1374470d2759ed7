"""Reads, writes, loads and stores of a file, and the first touch of its chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bench.dax.stage import DAX, NEVER, WAYS, Stage, Way, mount
from coherent_vfs.coherence.protocol.constants import CHUNK

SIZE = 64
"""Of the file, MiB."""
KIB, MIB = 1 << 10, 1 << 20
ROWS: Mapping[str, tuple[str, str, int]] = {
    "read, sequential, 4 KiB": ("read", "seq", 4 * KIB),
    "read, sequential, 1 MiB": ("read", "seq", MIB),
    "read, random, 4 KiB": ("read", "random", 4 * KIB),
    "write, sequential, 4 KiB": ("write", "seq", 4 * KIB),
    "write, sequential, 1 MiB": ("write", "seq", MIB),
    "write, random, 4 KiB": ("write", "random", 4 * KIB),
    "mmap load, sequential, 4 KiB": ("load", "seq", 4 * KIB),
    "mmap load, random, 4 KiB": ("load", "random", 4 * KIB),
    "mmap store, sequential, 4 KiB": ("store", "seq", 4 * KIB),
    "mmap store, random, 4 KiB": ("store", "random", 4 * KIB),
}
"""Operation, order and block of io.c."""
COLD: Mapping[str, tuple[str, str, int]] = {
    "first read of all, 4 KiB": ("read", "seq", 4 * KIB),
    "first read of all, 1 MiB": ("read", "seq", MIB),
    "first mmap load of all, 4 KiB": ("load", "seq", 4 * KIB),
}
"""The same, once, by a guest that has just mounted."""


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        blocks: Nanoseconds for a block, one number for each round, by row and way.
        touches: Nanoseconds of the first touch of a chunk with DAX, of all rounds.
    """

    blocks: Mapping[tuple[str, Way], Sequence[float]]
    touches: Sequence[float]


def measure(stage: Stage, rounds: int, seconds: float) -> Speeds:
    """Measure all, the ways in turn.

    Args:
        stage: With one guest.
        rounds: How often.
        seconds: Of each loop.
    """
    for way in WAYS:
        # Not one for all: what one guest maps to store into it the others do not keep.
        stage.file(way.name, SIZE)
    blocks: dict[tuple[str, Way], list[float]] = {}
    touches: list[float] = []
    for number in range(rounds):
        stage.say(f"round {number + 1} of {rounds}")
        ways = [*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]]
        for row, words in COLD.items():
            for way in ways:
                _forget(stage, way)
                _add(blocks, stage, row, way, words, 0)
        for row, words in ROWS.items():
            for way in ways:
                _add(blocks, stage, row, way, words, seconds)
        _forget(stage, DAX)
        touches += [float(line) for line in _run(stage, DAX, ("touch", "-", CHUNK), 0).split()]
    return Speeds(blocks, touches)


def _forget(stage: Stage, way: Way) -> None:
    (guest,) = stage.guests
    guest.check(f"umount /{way.name}; sync; echo 3 > /proc/sys/vm/drop_caches")
    mount(guest, way)


def _run(stage: Stage, way: Way, words: tuple[str, str, int], seconds: float) -> bytes:
    (guest,) = stage.guests
    operation, order, block = words
    return guest.check(f"/io {operation} {order} {block} {seconds} /{way.name}/{way.name}", timeout=seconds + 60)


def _add(
    blocks: dict[tuple[str, Way], list[float]],
    stage: Stage,
    row: str,
    way: Way,
    words: tuple[str, str, int],
    seconds: float,
) -> None:
    if way is NEVER and words[0] in ("load", "store"):
        return  # Without a page cache nothing can be mapped shared.
    _, nanoseconds = _run(stage, way, words, seconds).split()
    blocks.setdefault((row, way), []).append(float(nanoseconds))
