"""File systems with coarse timestamps, each in an image of its own on a loop device that goes with the mount."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.lab.paths import LabError

MAKERS = {
    "ext4-128": ("mke2fs", "-q", "-F", "-t", "ext4", "-I", "128", "-N", "65536"),
    "vfat": ("mkfs.vfat",),
}
"""How each is made: ext4 with small inodes counts seconds, vfat two."""
WITHOUT_LINKS = frozenset({"vfat"})
"""Those that have no links, owners, modes and extended attributes."""
SIZE = 64 << 20


class CannotMount(LabError):
    """This machine cannot mount such a file system; the message says why."""


@contextmanager
def coarse_file_system(kind: str, folder: Path) -> Iterator[Path]:
    """Make one and mount it in a new directory.

    Args:
        kind: one of MAKERS.
        folder: where the image and the mount point are put.

    Raises:
        CannotMount: only root can, with the program that makes it, and a loop device.
    """
    if os.geteuid():
        raise CannotMount("only root can mount an image")
    image, root = folder / f"{kind}.image", folder / kind
    with ExitStack() as stack:
        stack.callback(image.unlink)
        with image.open("xb") as file:
            file.truncate(SIZE)
        root.mkdir()
        stack.callback(root.rmdir)
        _run(*MAKERS[kind], str(image))
        _run("mount", "-o", "loop", str(image), str(root))
        # At once, though a backend that has just ended may still be letting go of it.
        stack.callback(_run, "umount", "--lazy", str(root))
        yield root


def within_a_second(seconds: float) -> None:
    """Sleep, where necessary, until so much of the current second is left."""
    if (late := time.time() % 1) > 1 - seconds:
        # The kernel's clock for timestamps is a tick late.
        time.sleep(1.02 - late)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CannotMount(f"there is no {command[0]}: install it") from None
    if done.returncode:
        raise CannotMount(f"{' '.join(command)}: {done.stderr.strip()}")
