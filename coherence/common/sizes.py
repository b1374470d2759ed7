"""Sizes in bytes as people write them: 4096, 16K, 2M, 64G, 1T."""

from __future__ import annotations

import re

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as 64G; units are powers of 1024. ValueError says how to write one."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper(), re.ASCII)
    if match is None:
        raise ValueError("use a size such as 512M, 64G or 1T")
    return int(match[1]) << UNITS[match[2]]


def size_text(size: int) -> str:
    """A size for people: 64G where that is exact, else with one decimal: 1.5G."""
    unit = max((unit for unit, bits in UNITS.items() if size >> bits), key=UNITS.__getitem__, default="")
    whole, rest = divmod(size, 1 << UNITS[unit])
    return f"{size / (1 << UNITS[unit]):.1f}{unit}" if rest else f"{whole}{unit}"
