"""What is changed on the host is seen by a stock guest in mode shared within the promised time (docs/leases.md)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.coherenced_process import eventually
from tests.integration.test_host_watch import EDITORS, git, repository
from tests.lab import backends
from tests.lab.guest import Guest, boot

__all__ = ["repository"]

LEASE_MAX = 1.0
"""Seconds: the default, and what is promised."""
OLD = 4.5
"""Seconds after which a thing has the longest leases."""
READ = "cat /mnt/{name}"
ALL = "cd /mnt && find d* -type f | sort | xargs cat | md5sum"


@pytest.fixture
def vm(kind: str, repository: Path, run_dir: Path) -> Iterator[tuple[Guest, Callable[[], int]]]:
    """A guest that has the repository at /mnt, and how many requests it has made."""
    table = f"/vt-{run_dir.name}"
    with ExitStack() as stack:
        stack.callback(backends.remove_table, table)
        daemon = stack.enter_context(backends.daemon(run_dir, table))
        options = ["--coherence", f"/dev/shm{table}", "--coherence-socket", str(daemon.socket)]
        options += ["--lease-max", str(LEASE_MAX)]
        backend = stack.enter_context(backends.ours(repository, run_dir, cache="shared", options=options))
        guest = stack.enter_context(boot(kind, shares={"share": backend.socket}, memory=512))
        guest.mount("share", "/mnt")
        yield guest, lambda: sum(counters["requests"] for counters in backends.counters(daemon.socket).values())


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_edits_and_a_checkout(vm: tuple[Guest, Callable[[], int]], repository: Path) -> None:
    guest, requests = vm
    files = [repository / f"edited{number}" for number in range(len(EDITORS))]
    for file in files:
        file.write_text("old")
    time.sleep(OLD)

    def is_kept(command: str) -> bool:
        guest.check(command)
        before = requests()
        guest.check(command)
        return requests() == before

    for file, edit in zip(files, EDITORS, strict=True):
        read = READ.format(name=file.name)
        # Otherwise nothing was cached that could be old.
        eventually(lambda read=read: is_kept(read))  # type: ignore[misc]
        edit(file)
        time.sleep(LEASE_MAX)
        assert guest.check(read) == file.read_bytes() != b"old"

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
