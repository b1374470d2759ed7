"""What was measured, as Markdown for people and for docs/development/benchmarks.md."""

from __future__ import annotations

import platform
import statistics
import textwrap
from collections.abc import Iterable, Sequence

from bench.modes.loops import CHANGE_MODES, CHANGES, GAIN_MODES, LEASE_MODES, LOOKS, SETS, LoopResults, mean
from bench.modes.stage import AUTO, NEVER, NONE, SHARED, Loop
from bench.modes.trees import MODES, SHOW_SIZES, TOOLS, TreeResults
from tests.lab import assets


def account(
    kind: str, rounds: int, files: int, loops: LoopResults | None, trees: TreeResults | None, *, summary: bool = False
) -> str:
    """How it was measured, and the tables.

    Args:
        kind: Of the guests, "qemu" or "uml".
        rounds: How often each was measured.
        files: Of the large tree.
        loops: What loops.c measured; None: not asked for.
        trees: What was measured on the large tree; None: not asked for.
        summary: Leave out how leases depend on the number of files, and the count of stale ones.
    """
    kernel = assets.uml_kernel() if kind == "uml" else assets.cloud_kernel()
    guest = {"uml": "User-Mode Linux", "qemu": "QEMU without KVM"}[kind]
    how = f"""
Two guests ({guest}, Linux {kernel.modules.name}) share a directory in tmpfs and have it mounted once in each mode; both
and all backends are pinned to one processor, coherenced to another, and the modes take turns in one run: {rounds}
rounds, medians of them. Rust virtiofsd is 1.13. What is looked at is some seconds old.
Host: Linux {platform.release()}, Python {platform.python_version()}.
Measured with `python -m bench.modes --kind {kind} --write-docs`."""
    if kind == "qemu":
        how += """
The guests have no page table isolation (`pti=off`): in software it makes each system call take five times as long, and
processors since 2019 need none (`tests/lab/accel.py`)."""
    parts = [textwrap.fill(how.strip(), 120, break_on_hyphens=False) + "\n"]
    if loops is not None:
        parts += [_looks(loops), _changes(loops), _waits(loops)]
    if trees is not None:
        parts.append(_walks(files, trees))
    if loops is not None and not summary:
        parts.append(_sets(loops))
    if trees is not None and not summary:
        parts.append(_missed(trees))
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _looks(results: LoopResults) -> str:
    rows = []
    for title in LOOKS:
        means = {mode: mean(results.looks[title, mode]) for mode in GAIN_MODES}
        each = {mode: [loop.mean for loop in results.looks[title, mode]] for mode in GAIN_MODES}
        gains = [_ratio(each[other], each[SHARED], 1) for other in (NONE, NEVER, AUTO)]
        rows.append([title, *(f"{means[mode]:.1f}" for mode in GAIN_MODES), *gains])
    head = ["repeated look", *(mode.title for mode in GAIN_MODES), "none : shared", "never : shared", "auto : shared"]
    return f"""\
**Gain**: microseconds for one look, the mean of some seconds, so that the renewal of leases is in it; and how many
times `shared` is faster: the median of the rounds, least and most.

{_table(head, rows)}"""


def _changes(results: LoopResults) -> str:
    rows = []
    for title in CHANGES:
        each = {mode: [loop.median for loop in results.changes[title, mode]] for mode in CHANGE_MODES}
        requests = _requests(results.changes[title, SHARED])
        ratios = [_ratio(each[SHARED], each[other], 2) for other in (NONE, AUTO)]
        rows.append([title, *(f"{statistics.median(each[mode]):.1f}" for mode in CHANGE_MODES), *ratios])
        rows[-1].append(f"{requests:.2f}")
    head = ["change", *(mode.title for mode in CHANGE_MODES), "shared : none", "shared : auto", "requests in shared"]
    return f"""\
**Cost of a change that meets no lease**, microseconds; `none` is in no domain and tells nobody of its changes.

{_table(head, rows)}"""


def _waits(results: LoopResults) -> str:
    rows = []
    for mode in LEASE_MODES:
        waits = results.waits[mode]
        deciles = statistics.quantiles(waits.each, n=10)
        shown = (min(waits.each), statistics.median(waits.each), deciles[-1], max(waits.each))
        rows.append([f"{mode.lease_max:g} s", f"{len(waits.each)}", f"{waits.held}", *(f"{ms:.0f}" for ms in shown)])
    head = ["--lease-max", "changes", "had to wait", "least", "median", "nine in ten", "most"]
    return f"""\
**Cost of a change that meets leases**, milliseconds: chmod, truncate, rename and unlink of files that the other guest
goes on looking at, eight at a time.

{_table(head, rows)}"""


def _sets(results: LoopResults) -> str:
    rows = []
    # What a look costs that asks nobody: the fastest passes over the smallest set.
    cached = min(results.sets[SETS[0], mode].least for mode in LEASE_MODES)
    none = mean(results.looks["stat of one file", NONE])
    for files in SETS:
        for mode in LEASE_MODES:
            loop = results.sets[files, mode]
            each = loop.mean
            rows.append(
                [
                    f"{files}, {mode.lease_max:g} s",
                    f"{each:.1f}",
                    f"{none / each:.1f}",
                    f"{_requests([loop]):.3f}",
                    f"{max(0.0, 1 - cached / each):.0%}",
                    f"{_cpu(loop):.1f}",
                ]
            )
    head = [
        "files, --lease-max",
        "us a stat",
        "none : this",
        "requests a stat",
        "time renewing",
        "CPU us a request",
    ]
    return f"""\
**What limits `shared` for stock guests**: each lease has to be renewed after --lease-max less --lease-margin, so a set
of N files costs N renewals in that time, however often it is looked at. A stat that asks nobody takes {cached:.1f} us
here; the rest of the time goes into renewing. CPU: of the backend.

{_table(head, rows)}"""


def _ratio(these: Sequence[float], those: Sequence[float], digits: int) -> str:
    """The median of what one is in terms of the other, measured in turns, and between what it lies."""
    ratios = sorted(this / that for this, that in zip(these, those, strict=True))
    return f"{statistics.median(ratios):.{digits}f} ({ratios[0]:.{digits}f} to {ratios[-1]:.{digits}f})"


def _requests(loops: Sequence[Loop]) -> float:
    return statistics.median((loop.requests or 0) / loop.count for loop in loops)


def _cpu(loop: Loop) -> float:
    return loop.cpu / loop.requests * 1e6 if loop.requests else 0.0


def _walks(files: int, results: TreeResults) -> str:
    rows = []
    for tool in TOOLS:
        shared, auto = (results.walks[tool, mode] for mode in MODES)
        for title, mine, other in (("cold", shared.cold, auto.cold), ("warm", shared.warm, auto.warm)):
            medians = [f"{statistics.median(each):.2f}" for each in (mine, other)]
            rows.append([f"{tool}, {title}", *medians, _ratio(mine, other, 2)])
    return f"""\
**A tree of {files} files**, seconds; cold: after the guest dropped its names and inodes, warm: repeated at once.

{_table(["walk", *(mode.title for mode in MODES), "shared : auto"], rows)}"""


def _missed(results: TreeResults) -> str:
    rows = []
    for tool in SHOW_SIZES:
        cells = []
        for mode in MODES:
            missed = results.missed[tool, mode]
            cells.append(f"{missed.stale} of {missed.changed}")
        rows.append([tool, *cells])
    return f"""\
**Stale**: files of a tree of 1,000 that the other guest changed, shown as before by the next look.

{_table(["look", *(mode.title for mode in MODES)], rows)}"""
