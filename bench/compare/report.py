"""The comparison as a table, for people and for docs/development/benchmarks.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from bench.compare.measure import Cost
from tests.lab import assets

NAMES = {"ours": "vfs-backend", "rust": "Rust virtiofsd", "c": "C virtiofsd"}


def table(results: Mapping[str, Mapping[str, Cost]]) -> str:
    """A Markdown table: latency / backend CPU in microseconds, and ours as a part of the best other's."""
    names = list(results)
    others = [name for name in names if name != "ours"]
    ratios = [f"ours : {NAMES[name]}" for name in others] if "ours" in results else []
    lines = ["| operation | " + " | ".join([*(NAMES[name] for name in names), *ratios]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) + len(ratios)))
    for title in results[names[0]]:
        cells = [f"{results[name][title].latency:.1f} / {results[name][title].cpu:.1f}" for name in names]
        if ratios:
            cells += [_ratio(results["ours"][title], results[name][title]) for name in others]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def account(kind: str, boots: int, rounds: int, results: Mapping[str, Mapping[str, Cost]]) -> str:
    """How it was measured, and the table.

    Args:
        kind: Of the guests, "uml" or "qemu".
        boots: How often the guests were booted anew.
        rounds: How often each was measured after each boot.
        results: For each backend, for each operation, its cost.
    """
    kernel = assets.uml_kernel() if kind == "uml" else assets.cloud_kernel()
    guest = {"uml": "User-Mode Linux", "qemu": "QEMU"}[kind]
    return f"""\
Latency in the guest / processor time of the backend for one operation, in microseconds: medians of {boots * rounds}
rounds, {rounds} after each of {boots} boots of all guests, in one run in which the backends take turns. Guests:
{guest}, Linux {kernel.modules.name}; cache=none (never) where nothing else is said; share in tmpfs; guests and backends
pinned to one processor. Listing cold: the guest's cached names and inodes are dropped before each listing, outside of
the latency; with cache=auto names and attributes come by READDIRPLUS. Host: Linux {platform.release()}, Python
{platform.python_version()}. The last columns are ratios: below 1.00 ours costs less. Measured with
`python -m bench.compare --write-docs`.

{table(results)}"""


def _ratio(mine: Cost, other: Cost) -> str:
    return f"{mine.latency / other.latency:.2f} / {mine.cpu / other.cpu:.2f}"
