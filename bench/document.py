"""Documents with measurements: what is measured stands between markers, and is replaced by the next measurement."""

from __future__ import annotations

from pathlib import Path

from tests.lab.paths import CHECKOUT

DOCUMENT = CHECKOUT / "docs/benchmarks.md"


def write(name: str, title: str, text: str, document: Path = DOCUMENT) -> None:
    """Put a text between its markers in a document, or add it there.

    Args:
        name: Of the markers.
        title: Of the section, where it has to be added.
        text: Markdown.
        document: The document.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text}{end}\n"
    old = document.read_text() if document.exists() else "# Benchmarks\n"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + block + rest.split(end, 1)[1].removeprefix("\n")
    else:
        new = f"{old.rstrip()}\n\n## {title}\n\n{block}"
    document.parent.mkdir(exist_ok=True)
    document.write_text(new)
