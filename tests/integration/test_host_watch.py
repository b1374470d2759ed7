"""A real coherenced watches directories for members: what is changed on the host is bumped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.client.membership import MAX_ASKED, Membership
from coherent_vfs.coherence.shm.table import Table
from tests.integration.coherenced_process import Coherenced, Member, eventually, open_directory


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


@pytest.fixture(params=["inotify", "fanotify"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "fanotify" and os.geteuid() != 0:
        pytest.skip("fanotify needs root: run this as root")
    return str(request.param)


@pytest.fixture
def daemon(tmp_path: Path, kind: str) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as daemon:
        daemon.start("--watch", kind)
        yield daemon


@pytest.fixture
def member(daemon: Coherenced, share: Path) -> Iterator[Member]:
    with Member(daemon, "red") as member:
        member.do(f"watch {share}")
        yield member


def inode_slot(table: Table, path: Path) -> int:
    status = path.lstat()
    return table.inode_slot(status.st_dev, status.st_ino)


def name_slot(table: Table, path: Path) -> int:
    return table.name_slot(inode_slot(table, path.parent), os.fsencode(path.name))


def write_in_place(path: Path) -> None:
    with path.open("r+") as file:
        file.write("new")


def rename_over(path: Path) -> None:
    new = path.with_name(f".{path.name}.swp")
    new.write_text("new")
    new.rename(path)


def keep_a_backup(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}~"))
    path.write_text("new")


EDITORS: list[Callable[[Path], object]] = [
    write_in_place,
    rename_over,
    keep_a_backup,
    lambda path: path.write_text("truncated and written"),
]


@pytest.mark.parametrize("edit", EDITORS)
def test_the_ways_of_editors(daemon: Coherenced, member: Member, share: Path, edit: Callable[[Path], object]) -> None:
    path = share / "notes"
    path.write_text("old")
    with daemon.table() as table:
        old = inode_slot(table, path)
        stamp = table.stamp()
        edit(path)
        # Either the name stands for another inode now, or the inode has changed.
        slot = old if inode_slot(table, path) == old else name_slot(table, path)
        eventually(lambda: not table.valid(slot, stamp))
    assert sum(daemon.status().status.floor_raises.values()) == 1 + daemon.mounts()


@pytest.mark.parametrize("kind", ["inotify"], indirect=True)
def test_a_watch_is_shared_and_ends_with_the_last_that_wants_it(
    daemon: Coherenced, member: Member, share: Path
) -> None:
    with Member(daemon, "blue") as other:
        other.do(f"watch {share}")
        other.do(f"watch {share.parent}")
        assert daemon.status().status.watch.watches == 2
    eventually(lambda: daemon.status().status.watch.watches == 1)
    with daemon.table() as table:
        stamp = table.stamp()
        (share / "f").touch()
        eventually(lambda: not table.valid(name_slot(table, share / "f"), stamp))


@pytest.mark.parametrize("kind", ["inotify"], indirect=True)
def test_many_directories_of_a_backend_that_goes(daemon: Coherenced, member: Member, share: Path) -> None:
    with Member(daemon, "blue") as other:
        for number in range(1000):
            (share / f"{number}").mkdir()
            other.do(f"watch {share / f'{number}'}")
        assert daemon.status().status.watch.watches == 1001
    eventually(lambda: daemon.status().status.watch.watches == 1)


def test_the_limit_of_watches(tmp_path: Path, share: Path) -> None:
    for name in "abcdef":
        (share / name).mkdir()
    with Coherenced(tmp_path) as daemon:
        daemon.start("--max-watches", "4")
        with Member(daemon, "greedy") as greedy, Member(daemon, "late") as late:
            # None gets more than its share of the second half.
            assert [greedy.ask(f"watch {share / name}") for name in "abcdef"] == [True, True] + 4 * [False]
            assert [late.ask(f"watch {share / name}") for name in "aefd"] == [True, True, False, False]
            # What is watched anyway costs nothing.
            assert greedy.ask(f"watch {share / 'e'}")
            watch = daemon.status().status.watch
            assert (watch.watches, watch.limit, watch.refused) == (3, 4, 6)
        assert daemon.log().count("not every directory is watched") == 1


def test_a_queue_that_overflows(daemon: Coherenced, member: Member, share: Path) -> None:
    assert daemon.process is not None
    path = share / "f"
    with daemon.table() as table:
        stamp = table.stamp()
        daemon.process.send_signal(signal.SIGSTOP)
        for _ in range(9000):
            path.touch()
            path.unlink()
        daemon.process.send_signal(signal.SIGCONT)
        eventually(lambda: table.floor > stamp)
        eventually(lambda: daemon.status().status.watch.overflows == 1)
        stamp = table.stamp()
        path.touch()
        eventually(lambda: not table.valid(name_slot(table, path), stamp))
    assert daemon.status().status.trusted


def test_a_daemon_that_is_killed_watches_nothing_until_it_is_asked_again(
    daemon: Coherenced, member: Member, share: Path
) -> None:
    daemon.kill()
    eventually(lambda: "forgotten" in member.log())
    assert not member.ask(f"watch {share}")
    daemon.start()
    eventually(lambda: daemon.status().status.trusted)
    assert daemon.status().status.watch.watches == 0
    member.do(f"watch {share}")
    with daemon.table() as table:
        stamp = table.stamp()
        (share / "f").touch()
        eventually(lambda: not table.valid(name_slot(table, share / "f"), stamp))


@pytest.mark.parametrize("kind", ["inotify"], indirect=True)
def test_something_leaves_the_watched_area(daemon: Coherenced, member: Member, share: Path) -> None:
    (share / "f").touch()
    with daemon.table() as table:
        stamp = table.stamp()
        (share / "f").rename(share.parent / "f")
        eventually(lambda: table.floor > stamp)


def test_a_backend_asks_for_so_much_at_once_and_never_waits(daemon: Coherenced, share: Path) -> None:
    answers: list[tuple[int, bool]] = []

    async def ask(membership: Membership) -> None:
        fd = os.open(share, os.O_PATH)
        assert not membership.watch(fd, 0), "before attach"
        membership.attach(asyncio.get_running_loop(), watched=lambda token, ok: answers.append((token, ok)))
        asked = [token for token in range(200) if membership.watch(fd, token)]
        assert asked == list(range(MAX_ASKED))
        while len(answers) < len(asked):
            await asyncio.sleep(0.001)
        assert answers == [(token, True) for token in asked]
        assert membership.watch(fd, 7)
        os.close(fd)
        membership.close()
        assert not membership.watch(fd, 8)

    table, socket = str(daemon.paths.table), str(daemon.socket)
    with open_directory(share) as root:
        asyncio.run(ask(Membership.join(table, share_root=root, guest="hasty", cache="shared", socket_path=socket)))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run this as root")
def test_a_mount_in_a_watched_directory(daemon: Coherenced, member: Member, share: Path) -> None:
    (share / "m").mkdir()
    with daemon.table() as table:
        stamp = table.stamp()
        subprocess.run(["mount", "-t", "tmpfs", "none", share / "m"], check=True)
        eventually(lambda: table.floor > stamp)
        stamp = table.stamp()
        subprocess.run(["umount", share / "m"], check=True)
        eventually(lambda: table.floor > stamp)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run this as root")
def test_a_mount_beside_the_share(tmp_path: Path, daemon: Coherenced, share: Path) -> None:
    (share / "m").mkdir()
    beside = str(tmp_path / "beside")
    Path(beside).mkdir()
    with Member(daemon, "green", share) as green, daemon.table() as table:
        green.do(f"watch {share}")
        stamp, mounts = table.stamp(), daemon.mounts()
        for command in (["mount", "-t", "tmpfs", "none", beside], ["umount", beside]):
            subprocess.run(command, check=True)
            # The second answer comes after what the daemon had to do before it was asked.
            green.do(f"watch {share / 'm'}")
            green.do(f"watch {share}")
        assert daemon.mounts() == mounts
        assert table.floor <= stamp
        before = daemon.status().status.floor_raises
        subprocess.run(["mount", "-t", "tmpfs", "none", share / "m"], check=True)
        eventually(lambda: table.floor > stamp)
        assert daemon.status().status.floor_raises == before | {"mount": before["mount"] + 1}
        subprocess.run(["umount", share / "m"], check=True)


def test_without_a_watch(tmp_path: Path, share: Path) -> None:
    with Coherenced(tmp_path) as daemon:
        daemon.start("--watch", "none")
        with Member(daemon, "red") as member:
            assert not member.ask(f"watch {share}")
        assert daemon.status().status.watch.kind == "none"


def git(*arguments: str, folder: Path) -> None:
    settings = {
        "user.name": "t",
        "user.email": "t@t",
        "gc.auto": "0",
        # All objects of a commit go into one pack: that is many times faster than a file for each.
        "core.bigFileThreshold": "1",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    subprocess.run(["git", *options, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(share: Path) -> Path:
    """5,000 files in 50 directories, with two commits that differ in each file."""
    git("init", "--quiet", folder=share)
    for text in ("one", "two"):
        for number in range(5000):
            path = share / f"d{number % 50}" / f"f{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text} {number}\n")
        git("add", ".", folder=share)
        git("commit", "--quiet", "--message", text, folder=share)
    return share


def test_a_checkout_is_seen_completely(daemon: Coherenced, member: Member, repository: Path) -> None:
    directories = list(repository.glob("d*"))
    for path in directories:
        member.do(f"watch {path}")
    files = [path for directory in directories for path in directory.iterdir()]
    with daemon.table() as table:
        before = {path: inode_slot(table, path) for path in files}
        stamp = table.stamp()
        git("checkout", "--quiet", "HEAD^", folder=repository)
        for path, old in before.items():
            assert path.read_text().startswith("one")
            slot = old if inode_slot(table, path) == old else name_slot(table, path)
            eventually(lambda slot=slot: not table.valid(slot, stamp))  # type: ignore[misc]
        status = daemon.status().status
    assert sum(status.floor_raises.values()) == 1 + daemon.mounts(), daemon.log()
    assert status.watch.events == status.watch.bumped + status.watch.own + status.watch.gone
    assert status.watch.overflows == 0, daemon.log()
