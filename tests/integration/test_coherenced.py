"""A running coherenced: start, status, signals, and who is refused."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl import main as ctl
from coherent_vfs.coherence.daemon import main as daemon
from coherent_vfs.coherence.daemon.registry import Registry
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.table import SLOTS_OFFSET, TRUST_NOTHING
from tests.integration.coherenced_process import SECONDS, SLOTS, Coherenced, Member, eventually, open_directory


@pytest.fixture
def coherenced(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        yield daemon


def join(coherenced: Coherenced, guest: str, share: Path | None = None) -> Membership:
    """Join in this process, with this share or the daemon's directory."""
    with open_directory(share or coherenced.directory) as root:
        return Membership.join(
            str(coherenced.paths.table),
            share_root=root,
            guest=guest,
            cache="none",
            socket_path=str(coherenced.socket),
        )


def refusal(process: subprocess.Popen[str], coherenced: Coherenced) -> str:
    """What a daemon that refuses to start says, which is one line."""
    assert process.wait(SECONDS) == 1
    lines = [line for line in coherenced.log().splitlines() if line.startswith("coherenced: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_fresh_daemon_makes_a_trusted_table(coherenced: Coherenced) -> None:
    coherenced.start()
    with coherenced.table() as table:
        assert table.slot_count == SLOTS
        assert table.floor <= table.sequence
    assert coherenced.status().status.trusted


def test_a_backend_is_shown_with_its_counters_and_its_root_is_in_the_table(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member, coherenced.table() as table:
        share = coherenced.directory.stat()
        assert table.is_root(table.inode_slot(share.st_dev, share.st_ino))
        member.do("bump 5")
        (backend,) = coherenced.status().backends
        assert (backend.pid, backend.guest, backend.cache) == (member.pid, "one", "shared")
        assert (backend.device, backend.inode) == (share.st_dev, share.st_ino)
        assert coherenced.counters("one") == {"requests": 7}


def test_more_shares_one_after_the_other_than_there_can_be_at_once(coherenced: Coherenced, tmp_path: Path) -> None:
    coherenced.start()
    with coherenced.table() as table:
        for number in range(300):
            share = tmp_path / str(number)
            share.mkdir()
            membership = join(coherenced, "one", share)
            status = share.stat()
            assert table.is_root(table.inode_slot(status.st_dev, status.st_ino))
            membership.close()
    eventually(lambda: not coherenced.status().backends)
    assert coherenced.status().status.roots == 0


def test_a_backend_that_leaves_is_forgotten_and_the_table_stays_trusted(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member:
        member.do("leave")
        eventually(lambda: not coherenced.paths.journal_keys())
        report = coherenced.status()
        assert report.status.trusted
        assert report.backends == []


def test_a_backend_that_leaves_makes_nobody_ask(coherenced: Coherenced, monkeypatch: pytest.MonkeyPatch) -> None:
    coherenced.start()
    with coherenced.table() as table:
        membership = join(coherenced, "one")
        stamp = table.stamp()

        def let_go(key: int) -> None:
            # An answer means that the daemon has seen whatever came before.
            coherenced.status()
            real_let_go(key)

        real_let_go = liveness.let_go
        monkeypatch.setattr(liveness, "let_go", let_go)
        membership.close()
        eventually(lambda: not coherenced.paths.journal_keys())
        assert table.valid(5, stamp)
    assert coherenced.status().status.distrusts == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_lock_of_another_user_is_no_running_daemon(coherenced: Coherenced) -> None:
    with coherenced.paths.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.chown(coherenced.paths.lock, 65534, -1)
        # With sysctl fs.protected_regular even root may not open it.
        line = refusal(coherenced.spawn(), coherenced)
        assert re.search(r"\.lock(: Permission denied| belongs to another user): remove it", line)


def test_bumps_are_counted_per_second(coherenced: Coherenced) -> None:
    coherenced.start()
    with Member(coherenced, "one") as member:

        def bumps() -> bool:
            member.do("bump 5")
            return coherenced.status().status.bumps_per_second > 0

        eventually(bumps)


def test_status_of_many_backends_comes_in_pages(coherenced: Coherenced) -> None:
    coherenced.start()
    members = [join(coherenced, f"g{i}") for i in range(20)]
    try:
        assert [backend.guest for backend in coherenced.status().backends] == [f"g{i}" for i in range(20)]
    finally:
        for member in members:
            member.close()


def test_coherencectl_prints_for_people_and_for_programs(
    coherenced: Coherenced, capsys: pytest.CaptureFixture[str]
) -> None:
    coherenced.start()

    def status() -> str:
        assert ctl.main(["status", "--socket", str(coherenced.socket)]) == 0
        return capsys.readouterr().out

    with Member(coherenced, "one"):
        assert f"{SLOTS} slots, trusted" in status()
        assert "one: pid" in status()
        # Where the daemon need not wait too long for that.
        eventually(lambda: "requests 7" in status())
        assert ctl.main(["status", "--socket", str(coherenced.socket), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["status"]["dax"]["windows"] == 0
        assert report["backends"][0]["guest"] == "one"
    assert ctl.main(["check", str(coherenced.paths.table)]) == 0
    assert "sound" in capsys.readouterr().out


def test_a_second_daemon_is_refused(coherenced: Coherenced) -> None:
    coherenced.start()
    line = refusal(coherenced.spawn("--socket", str(coherenced.directory / "other.sock")), coherenced)
    assert "running coherenced already" in line
    assert coherenced.status().status.trusted


def test_a_socket_of_another_process_is_refused(coherenced: Coherenced) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(coherenced.socket))
        other.listen()
        assert "in use by another process" in refusal(coherenced.spawn(), coherenced)


def test_a_file_at_the_sockets_path_is_refused(coherenced: Coherenced) -> None:
    coherenced.socket.write_text("precious")
    assert "is no socket" in refusal(coherenced.spawn(), coherenced)
    assert coherenced.socket.read_text() == "precious"


def test_a_table_of_another_version_is_refused_with_the_remedy(coherenced: Coherenced) -> None:
    coherenced.start()
    coherenced.stop()
    with coherenced.paths.table.open("r+b") as file:
        file.seek(8)
        file.write((99).to_bytes(8, "little"))
    line = refusal(coherenced.spawn(), coherenced)
    assert "ABI 99" in line
    assert "remove the file" in line


def test_a_table_that_a_killed_daemon_left_unfinished_is_made_anew(coherenced: Coherenced) -> None:
    coherenced.paths.table.write_bytes(bytes(SLOTS_OFFSET))
    coherenced.start()
    assert coherenced.status().status.trusted


def test_sigterm_ends_it_with_a_distrusted_table_and_no_socket(coherenced: Coherenced) -> None:
    coherenced.start()
    assert coherenced.stop() == 0
    coherenced.manager.wait_for("STOPPING=1")
    assert not coherenced.socket.exists()
    with coherenced.table() as table:
        assert table.floor == TRUST_NOTHING


def test_sighup_reads_the_settings_again(coherenced: Coherenced) -> None:
    config = coherenced.directory / "coherenced.toml"
    config.write_text('socket-mode = "0600"\n')
    coherenced.start("--config", str(config))
    assert coherenced.process is not None
    assert stat.S_IMODE(coherenced.socket.stat().st_mode) == 0o600
    config.write_text('socket-mode = "0666"\nslots = 2048\n')
    coherenced.process.send_signal(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in coherenced.manager.wait_for("RELOADING=1")
    coherenced.manager.wait_for("READY=1")
    assert stat.S_IMODE(coherenced.socket.stat().st_mode) == 0o666
    assert "reloaded" in coherenced.log()


def test_a_bad_file_on_sighup_changes_nothing(coherenced: Coherenced) -> None:
    config = coherenced.directory / "coherenced.toml"
    config.write_text('socket-mode = "0600"\n')
    coherenced.start("--config", str(config))
    assert coherenced.process is not None
    config.write_text('socket-mode = "rwx"\n')
    coherenced.process.send_signal(signal.SIGHUP)
    coherenced.manager.wait_for("RELOADING=1")
    coherenced.manager.wait_for("READY=1")
    assert stat.S_IMODE(coherenced.socket.stat().st_mode) == 0o600
    assert "not reloaded" in coherenced.log()


def test_the_watchdog_is_fed(coherenced: Coherenced) -> None:
    coherenced.start(environment={"WATCHDOG_USEC": "20000"})
    for _ in range(3):
        coherenced.manager.wait_for("WATCHDOG=1")


def join_as_nobody(coherenced: Coherenced) -> str:
    """What a backend of an unprivileged user is told when it joins and bumps; nothing if all is well."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for directory in (coherenced.directory, *coherenced.directory.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o011)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            membership = join(coherenced, "g")
            membership.table.bump(3)
            membership.close()
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(pid, 0)
    return told


def test_who_is_not_permitted_is_told_so(coherenced: Coherenced) -> None:
    coherenced.start()
    assert "not permitted: join the group" in join_as_nobody(coherenced)


def test_a_backend_of_another_user_may_join_where_the_socket_allows_it(coherenced: Coherenced) -> None:
    coherenced.start("--socket-group", "65534")
    assert join_as_nobody(coherenced) == ""


def test_a_backend_in_another_ipc_namespace_is_told_so(coherenced: Coherenced) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make namespaces")
    coherenced.start()
    member = ["-m", "tests.integration.coherenced_member", str(coherenced.paths.table)]
    done = subprocess.run(
        ["unshare", "--ipc", sys.executable, *member, str(coherenced.socket), "g", "/"], capture_output=True, text=True
    )
    assert "UserError" in done.stderr
    assert "IPC namespace of coherenced" in done.stderr
    eventually(lambda: not coherenced.paths.journal_keys())


def test_a_backend_without_a_daemon_is_told_so(tmp_path: Path) -> None:
    with open_directory(tmp_path) as root, pytest.raises(UserError, match="no coherenced at"):
        Membership.join("/dev/shm/nothing", share_root=root, guest="g", cache="none", socket_path=str(tmp_path / "s"))


def test_a_backend_that_names_another_table_is_told_so(coherenced: Coherenced, tmp_path: Path) -> None:
    coherenced.start()
    other = coherenced.directory / "table"
    other.write_bytes(b"")
    with open_directory(tmp_path) as root, pytest.raises(UserError, match="serves another table"):
        Membership.join(str(other), share_root=root, guest="g", cache="none", socket_path=str(coherenced.socket))
    eventually(lambda: not coherenced.paths.journal_keys())


def test_an_error_that_was_not_expected_ends_it_distrusted(
    coherenced: Coherenced, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("an error that was not expected")

    def bug(_: Registry) -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)

    monkeypatch.setattr(Registry, "sweep", bug)
    arguments = ["--table", coherenced.paths.name, "--slots", str(SLOTS), "--socket", str(coherenced.socket)]
    assert daemon.main(arguments) == 1
    with coherenced.table() as table:
        assert table.floor == TRUST_NOTHING


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (daemon.main, ["--slots", "many"], "--slots"),
        (daemon.main, ["--slots", "3000"], "power of two"),
        (daemon.main, ["--socket-mode", "rwx"], "socket-mode"),
        (daemon.main, ["--table", "a/b"], "use one such as vt"),
        (daemon.main, ["--tab", "/vt"], "--tab"),
        (ctl.main, [], "COMMAND"),
        (ctl.main, ["status", "--x"], "--x"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    main: Callable[[list[str]], int], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert says in told


@pytest.mark.parametrize(("main", "option"), [(daemon.main, "--socket-group"), (ctl.main, "check")])
def test_help_explains(main: Callable[[list[str]], int], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert option in told
    assert "Exit status" in told


def test_a_missing_settings_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", "/nowhere/c.toml"]) == 1
    assert capsys.readouterr().err == (
        "coherenced: /nowhere/c.toml: No such file or directory: name a readable file with --config\n"
    )
