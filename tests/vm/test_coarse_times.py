"""Two stock guests on a file system that counts seconds: no timestamp tells of a change within the second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.coarse_file_system import CannotMount, coarse_file_system, within_a_second
from tests.lab import backends
from tests.lab.guest import Guest, boot

ROUNDS = 8


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Path]:
    """A file system that counts seconds."""
    try:
        with coarse_file_system("ext4-128", tmp_path) as root:
            yield root
    except CannotMount as error:
        pytest.skip(str(error))


@pytest.fixture
def guests(kind: str, share: Path, run_dir: Path) -> Iterator[list[Guest]]:
    """Two guests of a domain that have the share at /mnt."""
    table = f"/vt-{run_dir.name}"
    with ExitStack() as stack:
        stack.callback(backends.remove_table, table)
        daemon = stack.enter_context(backends.daemon(run_dir, table))
        options = ["--coherence", f"/dev/shm{table}", "--coherence-socket", str(daemon.socket)]
        booted = []
        for name in ("a", "b"):
            folder = run_dir / name
            folder.mkdir()
            backend = stack.enter_context(backends.ours(share, folder, cache="shared", options=options))
            vm = stack.enter_context(boot(kind, shares={"share": backend.socket}, memory=64))
            vm.mount("share", "/mnt")
            booted.append(vm)
        yield booted


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
def test_what_another_guest_wrote_within_the_second_is_read(guests: list[Guest], share: Path) -> None:
    reader, writer = guests
    stale = 0
    for number in range(ROUNDS):
        within_a_second(0.8)
        second = int(time.time())
        writer.check(f"printf old{number:02} > /mnt/f{number}")
        # Held open, or the guest forgets it with its pages when the last look is over.
        reader.check(f"sleep 600 < /mnt/f{number} > /dev/null 2>&1 &")
        assert reader.check(f"cat /mnt/f{number}").startswith(b"old")
        time.sleep(0.3)
        writer.check(f"printf new{number:02} | dd of=/mnt/f{number} conv=notrunc 2> /dev/null")
        assert int((share / f"f{number}").stat().st_mtime) == second, "the machine is too slow for this test"
        stale += not reader.check(f"cat /mnt/f{number}").startswith(b"new")
    assert stale == 0, f"{stale} of {ROUNDS} rounds"
