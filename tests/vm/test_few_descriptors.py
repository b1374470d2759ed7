"""A stock guest that keeps more files in its cache than its backend may have open, also of those that are deleted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.vm.alone import alone_in_domain

FILES = 800
LIMIT = 700
"""Descriptors of the backend, of which inodes take half."""
HOLD = """
echo held > /mnt/held
exec 3< /mnt/held
rm /mnt/held
touch /deleted
while ! test -e /go; do sleep 0.1; done
cat <&3 > /found
touch /done
"""
"""A program that goes on using a file that it has deleted."""


@pytest.fixture
def share() -> Iterator[Path]:
    """On a file system that has file handles."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def guest(kind: str, share: Path, run_dir: Path) -> Iterator[Guest]:
    with alone_in_domain(kind, share, run_dir, "--rlimit-nofile", str(LIMIT)) as alone:
        yield alone.vm


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_files_that_the_host_deletes_behind_its_back(guest: Guest, share: Path) -> None:
    guest.check(f"({HOLD}) > /dev/null 2>&1 &")
    guest.check("while ! test -e /deleted; do sleep 0.1; done")
    for generation in range(3):
        tree = share / f"tree{generation}"
        tree.mkdir()
        for number in range(FILES):
            (tree / f"f{number}").write_text(f"{generation}\n")
        assert int(guest.check(f"cat /mnt/tree{generation}/* | grep -cx {generation}")) == FILES
        # The guest does not look there again, and so keeps what it knew of it.
        shutil.rmtree(tree)
    guest.check("touch /go; while ! test -e /done; do sleep 0.1; done")
    assert guest.check("cat /found") == b"held\n"
