"""coherencectl dax: who has a DAX window, how much of it is in use, and which files are mapped."""

from __future__ import annotations

from coherent_vfs.coherence.common.sizes import size_text
from coherent_vfs.coherence.ctl.client import DaxReport
from coherent_vfs.coherence.ctl.columns import aligned
from coherent_vfs.coherence.protocol.messages import DaxUse

WINDOW_COLUMNS = ("GUEST", "SIZE", "MAPPED", "MAPPINGS", "REFUSED", "PID")
FILE_COLUMNS = ("FILE", "MAPPED", "MAPPINGS", "WINDOWS")


def render(report: DaxReport) -> str:
    """The report for people."""
    windows = [
        (
            window.guest,
            size_text(window.size),
            size_text(window.mapped_bytes),
            str(window.mappings),
            str(window.refused),
            str(window.pid),
        )
        for window in report.windows
    ]
    files = [
        (f"{file.device}:{file.inode}", size_text(file.mapped_bytes), str(file.mappings), str(file.windows))
        for file in report.files
    ]
    lines = [in_words(report.use)]
    if windows:
        lines += ["", *aligned([WINDOW_COLUMNS, *windows], 1)]
    if files:
        lines += ["", *aligned([FILE_COLUMNS, *files], 1)]
        if len(files) < report.use.files:
            lines.append(f"and {report.use.files - len(files)} more")
    return "\n".join(lines)


def in_words(use: DaxUse) -> str:
    """All windows together, in a line."""
    if not use.windows:
        return f"no windows; a guest may have one of {size_text(use.window_limit)}"
    return (
        f"{use.windows} windows of {size_text(use.window_bytes)}, {size_text(use.total_limit)} at most; "
        f"{size_text(use.mapped_bytes)} mapped, {use.mappings} mappings of {use.files} files, {use.refused} refused"
    )
