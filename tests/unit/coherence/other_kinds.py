"""What may be where a regular file is expected."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path


def _link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to("/nowhere")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


OTHER_KINDS: tuple[Callable[[Path], None], ...] = (os.mkfifo, os.mkdir, _link, _dangling, _socket)


def remove(path: Path) -> None:
    """Remove what one of them made."""
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
