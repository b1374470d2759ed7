"""A stock guest on a share that is full: what it deletes is free for what it writes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_tmpfs import small_tmpfs
from tests.vm.alone import guest_in_mode

ROUNDS = 10
WRITE = "dd if=/dev/zero of={} bs=64k count=120 2>&1"
"""All but half a megabyte of the share."""


@pytest.mark.parametrize("kind", ["uml"], indirect=True)
@pytest.mark.parametrize("cache", ["none", "auto", "shared"])
def test_rm_makes_room_at_once(kind: str, cache: str, run_dir: Path) -> None:
    with small_tmpfs(size="8M") as share, guest_in_mode(kind, share, run_dir, cache) as vm:
        for _ in range(ROUNDS):
            vm.check(f"cd /mnt && {WRITE.format('big')} && rm big && {WRITE.format('z')} && rm z")
        vm.check(f"cd /mnt && {WRITE.format('z')} && {WRITE.format('new')}; test -e new")
        # Replaced by another, open until now, and deleted on the host just after it was looked at.
        vm.check("cd /mnt && rm new z && echo > small")
        vm.check(f"cd /mnt && {WRITE.format('a')} && mv small a && {WRITE.format('b')} && rm b")
        vm.check(f"cd /mnt && exec 3>c && {WRITE.format('c')} && rm c && exec 3>&- && {WRITE.format('d')}")
        vm.check("cat /mnt/d > /dev/null; for i in 1 2 3; do echo 3 > /proc/sys/vm/drop_caches; done")
        (share / "d").unlink()
        vm.check(f"cd /mnt && {WRITE.format('e')}")
        assert "No space left" in vm.run(f"cd /mnt && {WRITE.format('f')}").output.decode()
