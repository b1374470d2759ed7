"""The daemons live with what their systemd units leave them: system calls and capabilities."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.coherenced_process import SECONDS, Coherenced, Member, eventually
from tests.integration.user_guests import Backend, warm_up
from tests.lab import unit_filter

PACKAGING = Path(__file__).parents[2] / "packaging"
RENAME_EXCHANGE = 2
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3

pytestmark = pytest.mark.skipif(unit_filter.missing() is not None, reason=unit_filter.missing() or "")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path, unit_filter.prefix(PACKAGING / "coherenced.service")) as daemon:
        daemon.start("--realtime")
        yield daemon


@pytest.mark.parametrize("aware", [True, False])
def test_both_serve(daemon: Coherenced, tmp_path: Path, aware: bool) -> None:
    share = tmp_path / "share"
    share.mkdir()
    prefix = unit_filter.prefix(PACKAGING / "vfs-backend@.service")
    with (
        Backend(share, tmp_path, cache="shared", daemon=daemon, prefix=prefix) as backend,
        backend.connect(aware=aware) as guest,
    ):
        guest.mkdir("/d")
        guest.write_bytes("/d/f", bytes(20000))
        guest.chmod("/d/f", 0o640)
        guest.chown("/d/f", 7, 8)
        guest.utime("/d/f", ns=(1, 2))
        guest.truncate("/d/f", 10000)
        guest.link("/d/f", "/g")
        guest.symlink("d", "/l")
        guest.mknod("/fifo", stat.S_IFIFO | 0o600)
        guest.mknod("/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        guest.rename("/g", "/fifo", flags=RENAME_EXCHANGE)
        assert guest.read_bytes("/fifo") == bytes(10000)
        assert sorted(guest.listdir()) == ["d", "fifo", "g", "l", "null"]
        guest.unlink("/fifo")
        warm_up(guest, lambda: guest.stat("/d/f"))
        (share / "d/f").write_bytes(b"host")
        eventually(lambda: guest.stat("/d/f").st_size == 4)
        assert daemon.status().status.watch.watches >= 2
        assert daemon.stop() == 0


def test_fanotify_without_its_capability_is_refused_in_words(tmp_path: Path) -> None:
    with Coherenced(tmp_path, unit_filter.prefix(PACKAGING / "coherenced.service")) as daemon:
        assert daemon.spawn("--watch", "fanotify").wait(SECONDS) == 1
        assert "needs CAP_SYS_ADMIN" in daemon.log()


def test_fanotify_with_the_capability_of_a_drop_in(tmp_path: Path) -> None:
    unit = tmp_path / "coherenced.service"
    text = (PACKAGING / unit.name).read_text()
    unit.write_text(f"{text}\n[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN\n")
    with Coherenced(tmp_path, unit_filter.prefix(unit)) as daemon:
        daemon.start("--watch", "fanotify")
        with Member(daemon, "red") as member:
            member.do(f"watch {tmp_path}")
        assert daemon.status().status.watch.kind == "fanotify"


def test_what_a_unit_does_not_allow_kills(tmp_path: Path) -> None:
    """The filter is one: without it nothing here would be a test."""
    unit = tmp_path / "any.service"
    unit.write_text("[Service]\nSystemCallFilter=@system-service\nCapabilityBoundingSet=CAP_CHOWN\n")
    call = "import ctypes, os; ctypes.CDLL(None).open_by_handle_at(0, None, 0)"
    done = subprocess.run([*unit_filter.prefix(unit), sys.executable, "-c", call])
    assert done.returncode == -signal.SIGSYS
    look = "from pathlib import Path; print(Path('/proc/self/status').read_text())"
    done = subprocess.run([*unit_filter.prefix(unit), sys.executable, "-c", look], stdout=subprocess.PIPE)
    assert b"CapEff:\t0000000000000001" in done.stdout
