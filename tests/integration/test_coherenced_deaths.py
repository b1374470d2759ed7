"""kill -9 of backends and of coherenced, in every order: nothing is trusted that cannot be proved fresh."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl.status import render
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.table import TRUST_NOTHING
from tests.integration.coherenced_process import Coherenced, Member, eventually, open_directory


@pytest.fixture
def coherenced(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        yield daemon


def test_what_a_killed_backend_announced_is_bumped(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        stamp = table.stamp()
        member.do(f"announce 5 900 {table.slot_count + 77}")
        assert table.valid(5, stamp)
        member.kill()
        eventually(lambda: not coherenced.paths.journal_keys())
        assert not any(table.valid(slot, stamp) for slot in (5, 900, 77))
        assert table.valid(6, stamp)


def test_a_killed_backend_that_announced_its_root_bumps_slot_1_too(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        share = coherenced.directory.stat()
        stamp = table.stamp()
        member.do(f"announce {table.inode_slot(share.st_dev, share.st_ino)}")
        member.kill()
        eventually(lambda: not table.valid(1, stamp))


def test_more_than_a_journal_holds_makes_everything_invalid(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        stamp = table.stamp()
        member.do("announce " + " ".join(map(str, range(16))))
        member.kill()
        eventually(lambda: not coherenced.paths.journal_keys())
        assert not table.valid(500, stamp)
        assert table.valid(500, table.stamp())


def test_a_cleared_journal_bumps_nothing(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        member.do("announce 5")
        member.do("clear")
        stamp = table.stamp()
        member.kill()
        eventually(lambda: not coherenced.paths.journal_keys())
        assert table.valid(5, stamp)


def test_backends_distrust_at_once_and_come_back_to_a_new_daemon(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one"), Member(coherenced, "two"), coherenced.table() as table:
        before = table.stamp()
        coherenced.kill()
        eventually(lambda: table.floor == TRUST_NOTHING)
        coherenced.start()
        eventually(lambda: table.floor != TRUST_NOTHING)
        report = coherenced.status()
        assert sorted(backend.guest for backend in report.backends) == ["one", "two"]
        assert report.status.missing == []
        assert not table.valid(5, before)
        assert table.valid(5, table.stamp())


def test_the_floor_stays_until_every_living_backend_is_back(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one"), Member(coherenced, "two") as two, coherenced.table() as table:
        two.signal(signal.SIGSTOP)
        coherenced.kill()
        coherenced.start()
        eventually(lambda: len(coherenced.status().backends) == 1)
        assert table.floor == TRUST_NOTHING
        assert coherenced.status().status.missing == [two.pid]
        two.signal(signal.SIGCONT)
        eventually(lambda: coherenced.status().status.trusted)
        assert table.floor == coherenced.status().status.floor <= table.sequence


def test_a_backend_that_never_comes_back_holds_trust_up_only_until_it_dies(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        stamp = table.stamp()
        member.do("announce 5")
        member.signal(signal.SIGSTOP)
        coherenced.kill()
        coherenced.start()
        assert table.floor == TRUST_NOTHING
        member.kill()
        eventually(lambda: table.floor != TRUST_NOTHING)
        assert table.slot(5) > stamp


def test_a_backend_that_died_while_the_daemon_was_away_is_buried_by_the_next(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        stamp = table.stamp()
        member.do("announce 5")
        coherenced.kill()
        member.kill()
        assert table.slot(5) <= stamp
        coherenced.start()
        assert table.slot(5) > stamp
        assert coherenced.paths.journal_keys() == []
        assert coherenced.status().status.trusted


def test_a_daemon_killed_alone_is_recovered_with_its_stale_socket(coherenced: Coherenced) -> None:
    coherenced.start()
    with coherenced.table() as table:
        before = table.stamp()
        coherenced.kill()
        assert coherenced.socket.exists()
        coherenced.start()
        assert not table.valid(5, before)
        assert coherenced.status().status.domain == table.domain.hex()


def test_a_removed_table_is_never_trusted_again_by_its_backends(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as old:
        coherenced.kill()
        coherenced.paths.table.unlink()
        coherenced.start()
        eventually(lambda: "has a new table" in member.log())
        assert old.floor == TRUST_NOTHING
        assert coherenced.status().backends == []
        coherenced.kill()
        coherenced.start()
        assert member.log().count("has a new table") == 1
        assert old.floor == TRUST_NOTHING
        assert coherenced.status().status.trusted


def test_a_table_that_is_removed_while_all_runs(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member:
        assert not coherenced.status().status.removed
        coherenced.paths.table.unlink()
        assert "REMOVED: stop the virtual machines, restart coherenced" in render(coherenced.status())
        eventually(lambda: "the table was removed: stop the virtual machines" in coherenced.log())
        table, sock = str(coherenced.paths.table), str(coherenced.socket)
        with open_directory(coherenced.directory) as root, pytest.raises(UserError, match="removed while"):
            Membership.join(table, share_root=root, guest="two", cache="none", socket_path=sock)
        coherenced.stop()
        coherenced.start()
        eventually(lambda: "restart this virtual machine and its backend" in member.log())
        with Member(coherenced, "two"):
            report = coherenced.status()
            assert not report.status.removed
            assert (report.status.outside, [one.guest for one in report.backends]) == ([member.pid], ["two"])
            assert f"outside   pid {member.pid}: with a table that was removed; restart" in render(report)
            member.kill()
            eventually(lambda: not coherenced.status().status.outside)
    assert coherenced.log().count("the table was removed: stop") == 1


def test_a_backend_whose_journal_was_removed_gets_another(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        (old,) = coherenced.paths.journal_keys()
        member.do("announce 5")
        coherenced.kill()
        coherenced.paths.journal(old).unlink()
        liveness.remove(old)
        coherenced.start()
        eventually(lambda: len(coherenced.status().backends) == 1)
        assert coherenced.paths.journal_keys() != [old]
        stamp = table.stamp()
        member.kill()
        eventually(lambda: table.slot(5) > stamp)


def test_a_backend_in_a_sandbox_comes_back_and_only_to_the_true_daemon(coherenced: Coherenced) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can chroot")
    coherenced.start()
    sandbox = coherenced.directory / "sandbox"
    # What a guest could put into its share: a socket at the daemon's very path.
    trap = sandbox / str(coherenced.socket)[1:]
    trap.parent.mkdir(parents=True)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        Member(coherenced, "one") as member,
    ):
        # A socket address is too short for the path itself.
        directory = os.open(trap.parent, os.O_PATH)
        listener.bind(f"/proc/self/fd/{directory}/{trap.name}")
        os.close(directory)
        listener.listen()
        listener.setblocking(False)
        member.do(f"chroot {sandbox}")
        coherenced.kill()
        coherenced.start()
        eventually(lambda: len(coherenced.status().backends) == 1)
        with pytest.raises(BlockingIOError):
            listener.accept()
