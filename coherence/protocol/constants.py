"""What coherenced, vfs-backend and guests have to agree on, besides the messages."""

from typing import Final

CHUNK: Final = 2 << 20
"""Bytes: sizes, places, lengths and offsets in DAX windows are multiples of it (FUSE_DAX_SZ in fs/fuse/dax.c)."""
LABEL_MAX: Final = 64
"""Characters of the longest label, such as what a guest is called."""
