"""docs/benchmarks.md: what is measured stands between markers, and is replaced by the next measurement."""

from __future__ import annotations

from tests.lab.paths import CHECKOUT

DOCUMENT = CHECKOUT / "docs/benchmarks.md"


def write(name: str, title: str, text: str) -> None:
    """Put a text between its markers in docs/benchmarks.md, or add it there.

    Args:
        name: Of the markers.
        title: Of the section, where it has to be added.
        text: Markdown.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = f"{begin}\n{text}{end}\n"
    old = DOCUMENT.read_text() if DOCUMENT.exists() else "# Benchmarks\n"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + block + rest.split(end, 1)[1].removeprefix("\n")
    else:
        new = f"{old.rstrip()}\n\n## {title}\n\n{block}"
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(new)
