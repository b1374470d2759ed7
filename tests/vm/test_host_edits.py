"""What is changed on the host is seen by a stock guest in mode shared within the promised time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.coherenced_process import eventually
from tests.integration.test_host_watch import EDITORS, git, repository
from tests.vm.alone import Alone, alone_in_domain

__all__ = ["repository"]

LEASE_MAX = 1.0
"""Seconds: the default, and what is promised."""
OLD = 4.5
"""Seconds after which a thing has the longest leases."""
ALL = "cd /mnt && find d* -type f | sort | xargs cat | md5sum"


@pytest.fixture
def alone(kind: str, repository: Path, run_dir: Path) -> Iterator[Alone]:
    with alone_in_domain(kind, repository, run_dir, "--lease-max", str(LEASE_MAX), memory=512) as started:
        yield started


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_edits_and_a_checkout(alone: Alone, repository: Path) -> None:
    guest = alone.vm
    files = [repository / f"edited{number}" for number in range(len(EDITORS))]
    for file in files:
        file.write_text("old")
    time.sleep(OLD)

    def edited(file: Path, edit: Callable[[Path], object]) -> bytes:
        """What the guest reads when the promised time is over."""
        read = f"cat /mnt/{file.name}"
        # Otherwise nothing was cached that could be old.
        eventually(lambda: alone.requests(read) == 0)
        edit(file)
        time.sleep(LEASE_MAX)
        return guest.check(read)

    for file, edit in zip(files, EDITORS, strict=True):
        assert edited(file, edit) == file.read_bytes() != b"old"

    assert guest.check(ALL, timeout=120).split()[0].decode() == checksum(repository)
    git("checkout", "--quiet", "HEAD^", folder=repository)
    time.sleep(LEASE_MAX)
    assert guest.check(ALL, timeout=120).split()[0].decode() == checksum(repository)


def checksum(folder: Path) -> str:
    """Of the contents of all files in d*, in the order of their paths."""
    found = hashlib.md5(usedforsecurity=False)
    for path in sorted((path for path in folder.glob("d*/**/*") if path.is_file()), key=lambda path: str(path)):
        found.update(path.read_bytes())
    return found.hexdigest()
