"""What a soak test and its guests tell each other, one JSON value a line."""

from __future__ import annotations

from typing import Literal

import msgspec

Command = Literal["tell", "go on", "end"]
"""Stand still and tell; go on after that; unmount and end."""


class Held(msgspec.Struct, frozen=True):
    """A chunk of a file in a guest's window.

    Args:
        inode: of the file. offset: in it, bytes. moffset: in the window, bytes.
        mapped: whether there is something in the window.
    """

    inode: int
    offset: int
    moffset: int
    mapped: bool


class Told(msgspec.Struct, frozen=True):
    """The answer to "tell".

    Args:
        held: all that the guest has mapped.
        counts: how often it has done what since it was asked before.
    """

    held: list[Held]
    counts: dict[str, int]
