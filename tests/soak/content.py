"""What files hold: words that say where they belong, so that a byte of another place or file is known for one."""

from __future__ import annotations

import struct
from array import array
from typing import Final

WORD: Final = 8
_PLACE_BYTES: Final = 5
_PLACE: Final = (1 << 8 * _PLACE_BYTES) - 1


def make(file: int, offset: int, length: int, writer: int, generation: int) -> bytes:
    """Bytes to write.

    A word of 64 bits has its number in the file in bits 0 to 31, the file's in bits 32 to 39, who wrote it in 40 to
    47, and from 48 on what tells it from others of this writer.

    Args:
        file: number of the file, 1 to 255.
        offset, length: where the bytes go, of any alignment.
        writer: 0 to 255, generation: 16 bits.
    """
    first, skip = divmod(offset, WORD)
    upper = (generation & 0xFFFF) << 48 | writer << 40 | file << 32
    words = array("Q", (upper | number for number in range(first, (offset + length - 1) // WORD + 1)))
    return words.tobytes()[skip : skip + length]


def misplaced(file: int, offset: int, data: bytes) -> list[tuple[int, int]]:
    """The words that do not belong where they were read: their offset in the file, and the word.

    Zeros belong everywhere, as files have holes; so do words of which some bytes are not written yet.
    """
    if not any(data):
        return []
    first, skip = divmod(offset, WORD)
    padded = bytes(skip) + data + bytes(-(skip + len(data)) % WORD)
    upper = file << 32
    return [
        ((first + number) * WORD, word)
        for number, word in enumerate(array("Q", padded))
        if word & _PLACE != upper | (first + number) and not _partly(word, upper | (first + number))
    ]


def _partly(word: int, place: int) -> bool:
    """Whether each byte that tells the place is right, or zero."""
    seen, right = struct.pack("<Q", word), struct.pack("<Q", place)
    return all(byte in (0, right[number]) for number, byte in enumerate(seen[:_PLACE_BYTES]))
