"""Documents with measurements: a summary between markers in docs/development/benchmarks.md, all of it in docs/data/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess

from tests.lab.paths import CHECKOUT

DOCUMENT = CHECKOUT / "docs/development/benchmarks.md"
DATA = CHECKOUT / "docs/data"


def write(name: str, text: str, summary: str | None = None) -> None:
    """Put a measurement into its data file, and its summary between its markers in the document.

    Args:
        name: Of the markers and the file.
        text: All of it, Markdown.
        summary: Markdown; None: all of it.

    Raises:
        ValueError: The document has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    head, found, rest = DOCUMENT.read_text().partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{DOCUMENT} has no markers {name}")
    DOCUMENT.write_text(f"{head}{begin}{text if summary is None else summary}{end}{tail}")
    source = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}",
    }
    (DATA / f"{name.replace(' ', '-')}.json").write_text(json.dumps(source | parse(text), indent=1) + "\n")


def parse(text: str) -> dict[str, list[str] | list[list[str]]]:
    """The paragraphs of a Markdown text, and the rows of its tables, each of which begins with a row of headings."""
    lines = text.splitlines()
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    prose = "\n".join("" if line.startswith("|") else line for line in lines)
    return {"text": [" ".join(part.split()) for part in prose.split("\n\n") if part.strip()], "rows": rows}


def _commit() -> str:
    command = ["git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
