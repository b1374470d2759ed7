"""What was measured, as Markdown for people and for docs/development/benchmarks.md."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence

from bench.dax.memory import Taken
from bench.dax.speed import COLD, ROWS, SIZE, Speeds
from bench.dax.stage import DAX, WAYS, Way
from tests.lab import assets


def speeds(results: Speeds, rounds: int) -> str:
    """How fast files are.

    Args:
        results: What was measured.
        rounds: How often.
    """
    others = [way for way in WAYS if way is not DAX]
    head = ["", *(way.title for way in WAYS), *(f"{way.title} : DAX" for way in others)]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for row in (*ROWS, *COLD):
        dax = results.blocks[row, DAX]
        cells = [row]
        for way in WAYS:
            each = results.blocks.get((row, way))
            cells.append(f"{statistics.median(each) / 1e3:.2f}" if each else "-")
        for way in others:
            each = results.blocks.get((row, way))
            cells.append(_ratio(each, dax) if each else "-")
        lines.append(cells)
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    deciles = statistics.quantiles(results.touches, n=10)
    return f"""\
One guest (QEMU 11.1 without KVM, Linux {assets.cloud_kernel().modules.name}) has a directory mounted in four ways and
works on files of {SIZE} MiB that are in the host's page cache; guest and backends are pinned to one processor, the ways
take turns: {rounds} rounds. Microseconds for a block, the median of the rounds, and how many times DAX is faster: the
median of the rounds, least and most. With DAX the chunks are mapped before, `shared` and `auto` have all of it in the
guest's own page cache after the first pass; "first" is by a guest that has just mounted. Rust virtiofsd is 1.13. Host:
Linux {platform.release()}. Measured with `python -m bench.dax --parts speed --write-docs`.

{table}
First touch of a chunk of 2 MiB, which maps it: median {statistics.median(results.touches) / 1e3:.0f} us, nine in ten
below {deciles[-1] / 1e3:.0f} us, {len(results.touches)} chunks.
"""


def memory(results: Mapping[Way, Taken], size: int, count: int) -> str:
    """How much memory files take.

    Args:
        results: What was measured.
        size: Of the file, MiB.
        count: How many guests.
    """
    head = ["MiB", "page cache of the host", "memory of the guests", "both", "mapped, all guests", "by share"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for way, it in results.items():
        numbers = (it.cached, it.guests, it.cached + it.guests, it.mapped, it.shared)
        lines.append([way.title, *(f"{number:.0f}" for number in numbers)])
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"""\
{count} guests read a file of {size} MiB and have it open, which was not in the host's page cache before: what that took
there, and in the guests; and how much of files the virtual machines have mapped more, a page that n of them map counted
n times, and once (Pss). Measured with `python -m bench.dax --parts memory --size {size} --write-docs`.

{table}"""


def _ratio(slower: Sequence[float], faster: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(slower, faster, strict=True)]
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
