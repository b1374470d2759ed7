"""The comparison as a table, for people and for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping

from bench.compare.measure import Cost

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


def _ratio(mine: Cost, other: Cost) -> str:
    return f"{mine.latency / other.latency:.2f} / {mine.cpu / other.cpu:.2f}"
