"""What is changed on the host is seen by guests that cache, and what guests change costs them nothing more."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherent_vfs.coherence.ctl.status import render
from coherent_vfs.guest.guest import Guest
from coherent_vfs.server.main import ROOT_SECONDS
from tests.integration.coherenced_process import Coherenced, eventually
from tests.integration.test_host_watch import EDITORS, git, repository
from tests.integration.user_guests import Backend, requests_of, warm_up

__all__ = ["repository"]

LEASE_SECONDS = 1.0
ROUNDS = 1000
LOOKUP, GETATTR, READ = 1, 3, 15
RENAME_EXCHANGE = 2


def keep(guest: Guest, path: str) -> None:
    """Read a file until the guest keeps all of it; files are opened each time."""
    eventually(lambda: not {LOOKUP, GETATTR, READ} & set(requests_of(guest, lambda: guest.read_bytes(path))))


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


@pytest.fixture(params=["inotify"])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Coherenced]:
    if request.param == "fanotify" and os.geteuid() != 0:
        pytest.skip("fanotify needs root: run this as root")
    with Coherenced(tmp_path) as daemon:
        daemon.start("--watch", request.param)
        yield daemon


both_kinds = pytest.mark.parametrize("daemon", ["inotify", "fanotify"], indirect=True)


@pytest.fixture
def backend(tmp_path: Path, share: Path, daemon: Coherenced) -> Iterator[Backend]:
    with Backend(share, tmp_path, cache="shared", daemon=daemon) as backend:
        yield backend


@pytest.fixture
def guest(backend: Backend) -> Iterator[Guest]:
    with backend.connect() as guest:
        assert guest.aware
        yield guest


@both_kinds
@pytest.mark.parametrize("edit", EDITORS)
def test_an_edit_on_the_host_is_seen(share: Path, guest: Guest, edit: Callable[[Path], object]) -> None:
    path = share / "notes"
    path.write_text("old")
    keep(guest, "/notes")
    edit(path)
    # By time it would see nothing for a day.
    eventually(lambda: guest.read_bytes("/notes") == path.read_bytes())


@pytest.mark.parametrize(
    ("call", "look"),
    [
        (lambda share: (share / "new").touch(), lambda guest: guest.exists("/new")),
        (lambda share: (share / "d").rmdir(), lambda guest: guest.exists("/d")),
        (lambda share: (share / "d").chmod(0o700), lambda guest: guest.stat("/d").st_mode),
        (lambda share: (share / "d").rename(share / "e"), lambda guest: guest.listdir("/")),
        (lambda share: os.link(share / "f", share / "g"), lambda guest: guest.stat("/f").st_nlink),
        (lambda share: os.utime(share / "f", (1, 1)), lambda guest: guest.stat("/f").st_mtime),
        (lambda share: (share / "f").rename(share.parent / "f"), lambda guest: guest.exists("/f")),
    ],
)
def test_a_change_on_the_host_is_seen(
    share: Path, guest: Guest, call: Callable[[Path], object], look: Callable[[Guest], object]
) -> None:
    (share / "d").mkdir()
    (share / "f").touch()
    warm_up(guest, lambda: look(guest))
    before = look(guest)
    call(share)
    eventually(lambda: look(guest) != before)


@both_kinds
def test_a_file_with_two_links_one_of_them_elsewhere(share: Path, guest: Guest) -> None:
    (share / "f").touch()
    os.link(share / "f", share.parent / "g")
    keep(guest, "/f")
    (share.parent / "g").write_text("from outside")
    eventually(lambda: guest.read_bytes("/f") == b"from outside")


def test_a_file_that_left_and_is_still_open(share: Path, guest: Guest) -> None:
    (share / "f").touch()
    warm_up(guest, lambda: guest.stat("/f"))
    with guest.open("/f") as file:
        warm_up(guest, file.stat)
        (share / "f").rename(share.parent / "f")
        eventually(lambda: bool(requests_of(guest, file.stat)))
        (share.parent / "f").write_text("12345")
        eventually(lambda: file.stat().st_size == 5)


@both_kinds
def test_own_changes_are_not_bumped_again(share: Path, daemon: Coherenced, guest: Guest) -> None:
    """But for a few, where the backend was held up in the middle, or the kernel has merged what tells them apart."""
    warm_up(guest, lambda: guest.listdir("/"))
    kept = 0
    with daemon.table() as table:
        status = share.stat()
        slot = table.inode_slot(status.st_dev, status.st_ino)
        for number in range(50):
            own = daemon.status().status.watch.own
            guest.mkdir(f"/d{number}")
            value = table.slot(slot)
            eventually(lambda own=own: daemon.status().status.watch.own > own)  # type: ignore[misc]
            kept += table.slot(slot) == value
    # Else it is none at all.
    assert kept >= 25


def test_own_changes_in_a_hurry(daemon: Coherenced, guest: Guest) -> None:
    warm_up(guest, lambda: guest.listdir("/"))
    before, mounts = daemon.status().status, daemon.mounts()
    for number in range(300):
        guest.write_bytes(f"/f{number}", b"some text")
        guest.chmod(f"/f{number}", 0o600)
        guest.rename(f"/f{number}", f"/g{number}")
        if number % 3:
            guest.unlink(f"/g{number}")
    eventually(lambda: daemon.status().status.watch.events > before.watch.events + 900)
    after = daemon.status().status
    raises = sum(after.floor_raises.values()) - sum(before.floor_raises.values())
    assert raises == daemon.mounts() - mounts
    assert after.watch.bumped - before.watch.bumped < (after.watch.own - before.watch.own) / 2


@both_kinds
def test_no_change_is_lost_between_those_of_others(
    share: Path, tmp_path: Path, daemon: Coherenced, backend: Backend
) -> None:
    """Host and guest write one file at about the same time, again and again; another guest sees what came of it."""
    chance = random.Random(1)
    path = share / "f"
    path.write_bytes(bytes(8))
    fd = os.open(path, os.O_WRONLY)
    with (
        Backend(share, tmp_path, name="b", cache="shared", daemon=daemon) as another,
        backend.connect() as writer,
        another.connect() as witness,
        writer.open("/f", os.O_WRONLY) as file,
    ):
        keep(witness, "/f")
        turn, done = threading.Semaphore(0), threading.Semaphore(0)

        def write() -> None:
            for number in range(ROUNDS):
                turn.acquire()
                file.pwrite(number.to_bytes(4, "little"), 0)
                done.release()

        thread = threading.Thread(target=write)
        thread.start()
        for number in range(ROUNDS):
            turn.release()
            # A write through the guest takes some 100 microseconds.
            end = time.perf_counter() + chance.random() * 300e-6
            while time.perf_counter() < end:
                pass
            os.pwrite(fd, number.to_bytes(4, "little"), 4)
            done.acquire()
            expected = number.to_bytes(4, "little") * 2
            eventually(lambda expected=expected: witness.read_bytes("/f") == expected)  # type: ignore[misc]
        thread.join()
    os.close(fd)


@pytest.mark.slow
def test_a_checkout_is_seen_completely(tmp_path: Path, repository: Path, daemon: Coherenced, backend: Backend) -> None:
    names = [f"/{path.relative_to(repository)}" for path in sorted(repository.glob("d*/*"))]
    assert len(names) == 5000
    with (
        Backend(repository, tmp_path, name="b", cache="shared", daemon=daemon) as another,
        backend.connect() as aware,
        another.connect(aware=False) as stock,
    ):
        guests = [aware, stock]
        for _ in range(2):
            for guest in guests:
                assert all(guest.read_bytes(name).startswith(b"two") for name in names)
        for name in names:
            guest.stat(name)
        git("checkout", "--quiet", "HEAD^", folder=repository)
        time.sleep(LEASE_SECONDS)
        for guest in guests:
            assert all(guest.read_bytes(name).startswith(b"one") for name in names)


def test_watches_end_with_what_they_are_of(daemon: Coherenced, share: Path, guest: Guest) -> None:
    """However fast a name is given to something new, and where exchanges and links confuse what events tell."""
    for _ in range(500):
        guest.mkdir("/d")
        guest.symlink("q", "/d/s")
        guest.unlink("/d/s")
        guest.rmdir("/d")
    for _ in range(50):
        guest.mkdir("/d")
        guest.write_bytes("/f", b"")
        guest.link("/f", "/g")
        guest.stat("/g")
        guest.rename("/d", "/f", flags=RENAME_EXCHANGE)
        guest.unlink("/d")
        guest.unlink("/g")
        guest.rmdir("/f")
    eventually(lambda: daemon.status().status.watch.watches == 1)


@both_kinds
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run this as root")
def test_a_file_system_in_the_share_can_be_unmounted_when_the_guest_has_gone(
    daemon: Coherenced, share: Path, backend: Backend
) -> None:
    mounted = share / "m"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    try:
        (mounted / "d").mkdir()
        (mounted / "d" / "f").write_text("x")
        with backend.connect() as guest:
            warm_up(guest, lambda: guest.stat("/m/d/f"))
            watches = daemon.status().status.watch.watches
        eventually(lambda: subprocess.run(["umount", mounted], capture_output=True).returncode == 0)
    finally:
        subprocess.run(["umount", "--lazy", mounted], capture_output=True)
    assert watches > daemon.status().status.watch.watches
    # The next guest's copies are as good as the first one's were.
    (share / "f").write_text("old")
    with backend.connect() as guest:
        warm_up(guest, lambda: guest.stat("/f"))
        (share / "f").write_text("newer")
        eventually(lambda: guest.stat("/f").st_size == 5)


@both_kinds
@pytest.mark.parametrize("again", [False, True])
def test_a_shared_directory_that_is_removed_is_told_once(
    daemon: Coherenced, share: Path, backend: Backend, guest: Guest, again: bool
) -> None:
    remedy = "make it again, then restart the virtual machine with its backend"
    assert daemon.counters("a")["removed"] == 0
    assert remedy not in render(daemon.status())
    share.rmdir()
    if again:
        share.mkdir()
    eventually(lambda: remedy in backend.log())
    assert daemon.counters("a")["removed"] == 1
    assert render(daemon.status()).count(remedy) == 1
    # Longer than the backend looks again.
    time.sleep(2 * ROOT_SECONDS)
    assert backend.log().count(remedy) == 1
