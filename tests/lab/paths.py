"""Where the laboratory keeps what it fetched and built: $LAB_DIR, or .lab/ in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LAB_DIR = Path(os.environ.get("LAB_DIR", CHECKOUT / ".lab")).resolve()
APT_DIR = LAB_DIR / "apt"
TREES = LAB_DIR / "trees"
BUILT = LAB_DIR / "built"
"""Programs compiled here for the guests, named by the hash of their source."""


class LabError(Exception):
    """The laboratory cannot do what was asked; the message names the thing and the remedy."""
