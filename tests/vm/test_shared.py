"""What a stock guest in mode shared need not ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.coherenced_process import eventually
from tests.vm.alone import Alone, alone_in_domain

FOLDERS, FILES = 3, 100
"""Folders, and files in each."""
LOOK = "stat > /dev/null /mnt/first"
OPTIONS = ["--lease-max", "10", "--lease-margin", "0.1"]
"""What is a few seconds old has leases for a second; the longest come when it is forty."""


@pytest.fixture
def alone(kind: str, share: Path, run_dir: Path) -> Iterator[Alone]:
    for number in range(FOLDERS * FILES):
        folder = share / f"d{number % FOLDERS}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number}").write_text(str(number))
    for number in range(20):
        (share / f"first{number}").mkdir()
        (share / f"first{number}/f").touch()
    with alone_in_domain(kind, share, run_dir, *OPTIONS) as started:
        yield started


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_what_is_listed_or_looked_at_is_kept(alone: Alone) -> None:
    walk = "test $(ls -lR /mnt/d* | grep -c ' f[0-9]*$') = 300"

    def cold() -> int:
        # What is forgotten is told as requests, too.
        alone.vm.check("echo 2 > /proc/sys/vm/drop_caches")
        return alone.requests(walk)

    # Lists bring attributes: with them nobody asks for the files one by one. And they are kept, while leases last.
    eventually(lambda: cold() < FOLDERS * FILES // 2)
    eventually(lambda: alone.requests(f"{walk} && {walk}") < FOLDERS * FILES // 10)
    # So is what was looked at only once, and the first time in its directory, unless the host watch was too slow.
    assert any(alone.requests(f"{LOOK}{number}/f") and not alone.requests(f"{LOOK}{number}/f") for number in range(20))
