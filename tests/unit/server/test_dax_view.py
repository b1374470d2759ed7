"""Views of files: what is seen through their mappings, what is refused, and deaths. Needs root and FUSE passthrough."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from coherent_vfs.server.dax import view as view_module
from coherent_vfs.server.dax.view import MOST_STARTS, View
from coherent_vfs.server.dax.view_process import SIZE, ViewServer
from coherent_vfs.server.fuse import protocol as p

CHUNK = 2 << 20
WAIT = 30.0
"""Seconds after which a process counts as hanging."""


@pytest.fixture(scope="module")
def view() -> Iterator[View]:
    """One for all tests that do not end it."""
    with View() as made:
        if not made.available:
            pytest.skip(f"no views: {made.reason}")
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 5000 bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"hello" * 1000)
    return path


@pytest.fixture
def mapped(view: View, path: Path) -> Iterator[mmap.mmap]:
    """Its first chunk."""
    with mapping(view, path) as whole:
        yield whole


def opened(view: View, path: Path) -> int:
    """A descriptor of a view of the file at a path."""
    fd = os.open(path, os.O_RDWR)
    try:
        return view.open(fd)
    finally:
        os.close(fd)


def mapping(view: View, path: Path) -> mmap.mmap:
    """The file's first chunk, mapped from a view that is closed again."""
    fd = opened(view, path)
    try:
        return mmap.mmap(fd, CHUNK)
    finally:
        os.close(fd)


def run(code: str, *arguments: str, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [*wrapper, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT)


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- what is seen --------------------------------------------------------------------------------


def test_a_view_is_large_enough_for_qemu(view: View, path: Path) -> None:
    fd = opened(view, path)
    assert os.lseek(fd, 0, os.SEEK_END) == os.fstat(fd).st_size == SIZE
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert path.stat().st_size == 5000


def test_partial_last_page(mapped: mmap.mmap) -> None:
    assert mapped[:5000] == b"hello" * 1000
    assert mapped[5000:8192] == bytes(3192)


def test_growth_is_seen(mapped: mmap.mmap, path: Path) -> None:
    assert mapped[4990:5000] == b"hellohello"
    with path.open("ab") as file:
        file.write(b"x" * 10_000)
    assert mapped[5000:15_000] == b"x" * 10_000
    os.truncate(path, CHUNK)
    assert mapped[CHUNK - 4096 :] == bytes(4096)


def test_an_empty_file_grows(view: View, path: Path) -> None:
    os.truncate(path, 0)
    with mapping(view, path) as mapped:
        path.write_bytes(b"now")
        assert mapped[:4] == b"now\0"


def test_stores_both_ways(view: View, mapped: mmap.mmap, path: Path) -> None:
    mapped[100:103] = b"abc"
    assert path.read_bytes()[100:103] == b"abc"
    with mapping(view, path) as other, path.open("r+b") as file, mmap.mmap(file.fileno(), 5000) as real:
        other[200:203] = b"def"
        real[300:303] = b"ghi"
        for each in (mapped, other, real):
            assert (each[100:103], each[200:203], each[300:303]) == (b"abc", b"def", b"ghi")
    assert path.stat().st_size == 5000


def test_a_file_without_a_name(view: View, mapped: mmap.mmap, path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    other_fd = view.open(fd)
    with mmap.mmap(other_fd, CHUNK) as other:
        other[:3] = b"abc"
    assert mapped[:3] == os.pread(fd, 3, 0) == b"abc"
    os.close(other_fd)
    os.close(fd)


TOUCH = """
import mmap, os, sys
from coherent_vfs.server.dax.view import MOST_STARTS, View
with View() as view:
    fd = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(view.open(fd), 2 << 20)
    os.ftruncate(fd, 20_000)
    mapped[19_000:20_000]
    os.ftruncate(fd, 5000)
    print(mapped[4999:5001], mapped[8191], flush=True)
    mapped[int(sys.argv[2])]
    print("lived")
"""


@pytest.mark.usefixtures("view")
@pytest.mark.parametrize(("place", "status"), [(8191, 0), (8192, -signal.SIGBUS), (CHUNK - 1, -signal.SIGBUS)])
def test_truncation_ends_access_beyond_the_last_page(path: Path, place: int, status: int) -> None:
    ended = run(TOUCH, str(path), str(place))
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.startswith("b'o\\x00' 0\n")


# --- what is refused -----------------------------------------------------------------------------


def refused(view: View, fd: int) -> int:
    """The errno of the attempt; the view works afterwards."""
    with pytest.raises(OSError) as caught:
        view.open(fd)
    assert view.available
    assert caught.value.errno is not None
    return caught.value.errno


def test_what_is_no_file_to_read_and_write_is_refused(view: View, path: Path) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_PATH):
        fd = os.open(path, flags)
        assert refused(view, fd) == errno.EBADF
        os.close(fd)
    directory = os.open(path.parent, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    assert [refused(view, fd) for fd in (directory, ours.fileno())] == [errno.EINVAL] * 2
    os.close(directory)
    ours.close()
    theirs.close()


def test_a_bad_descriptor_is_refused(view: View) -> None:
    with pytest.raises(OSError) as caught:
        view.open(1_000_000)
    assert (caught.value.errno, view.available) == (errno.EBADF, True)


def test_a_view_cannot_change_the_size(view: View, path: Path) -> None:
    fd = opened(view, path)
    for size in (0, CHUNK):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(OSError):
        os.posix_fallocate(fd, 0, CHUNK)
    os.close(fd)
    assert path.stat().st_size == 5000


def test_no_descriptor_left(view: View, path: Path) -> None:
    """Where the backend has no descriptor left; what it cannot open is not kept in the view process either."""
    fd = os.open(path, os.O_RDWR)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # None at all, however many numbers are free: others in this process may close theirs at any time. Not 0, by which
    # poll(2) would refuse to wait.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        for _ in range(3):
            assert refused(view, fd) == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    os.close(view.open(fd))
    os.close(fd)


# --- file systems, and how much is kept ----------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system at a new directory, with options."""
    mounted: list[Path] = []

    def mount(kind: str, options: str = "rw") -> Path:
        at = tmp_path / f"mounted{len(mounted)}"
        at.mkdir()
        subprocess.run(["mount", "-t", kind, "-o", options, "none", at], check=True)
        mounted.append(at)
        return at

    yield mount
    for at in reversed(mounted):
        until(partial(unmount, at))


def unmount(at: Path) -> bool:
    """Whether nothing is in use there any more."""
    return subprocess.run(["umount", at], stderr=subprocess.DEVNULL).returncode == 0


def layers(mount: Callable[..., Path]) -> str:
    """Options of an overlay with new directories."""
    base = mount("tmpfs")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    return f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"


def test_overlay(view: View, mount: Callable[..., Path]) -> None:
    path = mount("overlay", layers(mount)) / "file"
    path.write_bytes(b"hello")
    with mapping(view, path) as mapped:
        mapped[:1] = b"j"
        with path.open("ab") as file:
            file.write(b"!")
        assert (mapped[:7], path.read_bytes()) == (b"jello!\0", b"jello!")


def test_too_many_layers_are_refused(view: View, mount: Callable[..., Path]) -> None:
    lower = mount("overlay", layers(mount))
    path = mount("overlay", layers(mount).replace("lowerdir=", f"lowerdir={lower}:", 1)) / "file"
    path.write_bytes(b"hello")
    fd = os.open(path, os.O_RDWR)
    assert refused(view, fd) == errno.ELOOP
    os.close(fd)


def test_ten_thousand_views_leave_nothing(view: View, mount: Callable[..., Path]) -> None:
    path = mount("tmpfs") / "file"
    path.write_bytes(b"hello")
    fd = os.open(path, os.O_RDWR)
    process = Path(f"/proc/{view.pid}/fd")
    before = len(list(process.iterdir()))
    for _ in range(10_000):
        os.close(view.open(fd))
    assert len(list(process.iterdir())) == before
    os.close(fd)
    # That the file system can be unmounted afterwards shows that the kernel has let go of the file.


# --- deaths --------------------------------------------------------------------------------------


@pytest.fixture
def mortal(view: View) -> Iterator[View]:
    """One to be ended."""
    with View() as made:
        assert made.available, made.reason
        yield made


def test_the_view_process_is_killed(mortal: View, path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    view_fd = mortal.open(fd)
    mapped = mmap.mmap(view_fd, CHUNK)
    pid = mortal.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}/exe").exists())
    mapped[:1] = b"j"
    os.pwrite(fd, b"!" * 8192, 5000)
    assert (os.pread(fd, 1, 0), mapped[13_191:13_193]) == (b"j", b"!\0")
    with mmap.mmap(view_fd, CHUNK) as later:
        later[1:2] = b"i"
        assert (mapped[:2], later[13_191:13_193]) == (b"ji", b"!\0")
    with mapping(mortal, path) as anew:
        assert anew[:2] == b"ji"
    assert mortal.available
    assert mortal.pid != pid
    os.close(view_fd)
    mapped.close()
    os.close(fd)


def test_a_view_process_that_ends_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
    mortal: View,
    path: Path,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expect_log("no more DAX")
    # However slow the machine is.
    monkeypatch.setattr(view_module, "CRASH_SECONDS", 1e9)
    ended: list[bool] = []
    mortal.on_end = lambda: ended.append(mortal.available)
    pids = set()
    with path.open("r+b") as file:
        for _ in range(MOST_STARTS):
            pids.add(mortal.pid)
            os.kill(mortal.pid, signal.SIGKILL)
            os.close(mortal.open(file.fileno()))
        assert len(pids) == MOST_STARTS
        assert not ended
        os.kill(mortal.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(OSError, match="the view process is gone: it ended") as caught:
                mortal.open(file.fileno())
            assert caught.value.errno == errno.ENOTCONN
    assert ended == [False]
    assert (mortal.available, mortal.pid) == (False, 0)
    assert caplog.text.count("no more DAX") == 1


def test_deaths_that_are_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch, mortal: View, path: Path) -> None:
    monkeypatch.setattr(view_module, "CRASH_SECONDS", 0.0)
    for _ in range(MOST_STARTS + 2):
        os.kill(mortal.pid, signal.SIGKILL)
        os.close(opened(mortal, path))
    assert mortal.available


def test_a_view_process_that_cannot_be_started_anew(
    monkeypatch: pytest.MonkeyPatch, mortal: View, path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("no more DAX")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    os.kill(mortal.pid, signal.SIGKILL)
    with path.open("r+b") as file, pytest.raises(OSError, match="cannot be started anew: the view process ended"):
        mortal.open(file.fileno())
    assert not mortal.available


def test_the_view_process_is_stopped(monkeypatch: pytest.MonkeyPatch, view: View, path: Path) -> None:
    monkeypatch.setattr(view_module, "ANSWER_TIMEOUT", 3.0)
    with View() as stopped:
        pid = stopped.pid
        os.kill(pid, signal.SIGSTOP)
        os.close(opened(stopped, path))
        assert stopped.pid != pid
        assert not Path(f"/proc/{pid}").exists()


def test_signals_to_all_processes_do_not_end_it(mortal: View, path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(mortal.pid, number)
    os.close(opened(mortal, path))


def test_closing(mortal: View, path: Path) -> None:
    fd = opened(mortal, path)
    pid = mortal.pid
    mortal.close()
    mortal.close()
    assert not Path(f"/proc/{pid}").exists()
    with mmap.mmap(fd, CHUNK) as mapped:
        assert mapped[:5] == b"hello"
    os.close(fd)
    with path.open("r+b") as file, pytest.raises(OSError, match="closed"):
        mortal.open(file.fileno())


FOREVER = """
import os, sys
from coherent_vfs.server.dax.view import MOST_STARTS, View
view = View()
print(view.pid, flush=True)
fd = os.open(sys.argv[1], os.O_RDWR)
pid = view.pid
while view.pid == pid:
    os.close(view.open(fd))
"""


@pytest.mark.usefixtures("view")
@pytest.mark.parametrize("victims", ["view", "backend", "both", "both, the view first"])
def test_nothing_hangs_whoever_is_killed(path: Path, victims: str) -> None:
    """Each dies while the other waits for it, more often than not."""
    for round_ in range(4):
        command = [sys.executable, "-c", FOREVER, str(path)]
        backend = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert backend.stdout is not None
        view_pid = int(backend.stdout.readline())
        watch = os.pidfd_open(view_pid)
        # At another moment of an opening each time.
        time.sleep(0.05 + 0.00007 * round_)
        pids = {"view": [view_pid], "backend": [backend.pid], "both": [backend.pid, view_pid]}
        for pid in pids.get(victims, [view_pid, backend.pid]):
            os.kill(pid, signal.SIGKILL)
        with backend.stdout:
            backend.stdout.read()
        assert backend.wait(WAIT) == (0 if victims == "view" else -signal.SIGKILL)
        assert select.select([watch], [], [], WAIT)[0], "the view process hangs"
        os.close(watch)


def test_the_current_directory_is_not_imported_from(monkeypatch: pytest.MonkeyPatch, view: View, path: Path) -> None:
    (path.parent / "struct.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(path.parent)
    with View() as other:
        assert other.available, other.reason


# --- where there are no views --------------------------------------------------------------------

REASON = "from coherent_vfs.server.dax.view import View; view = View(); print(view.available, view.reason)"


def test_without_the_capability() -> None:
    told = run(f"from coherent_vfs.server.host.mount_api import keep_only; keep_only(0); {REASON}")
    assert told.stdout == "False it takes the capability CAP_SYS_ADMIN\n", told.stderr


def test_with_the_capability_in_a_container_only() -> None:
    told = run(REASON, wrapper=("unshare", "--user", "--map-root-user", "--mount"))
    assert told.stdout == "False it takes the capability CAP_SYS_ADMIN of the whole machine\n", told.stderr


def test_without_the_device() -> None:
    hide = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    told = run(REASON, wrapper=("unshare", "--mount", "sh", "-c", hide, "sh"))
    assert told.stdout == "False /dev/fuse: No such file or directory\n", told.stderr


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("/bin/false", "the view process ended with status 1"),
        ("/none", "the view process: [Errno 2] No such file or directory: '/none'"),
    ],
)
def test_a_view_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with View() as broken:
        assert broken.reason == reason
        with pytest.raises(OSError, match="the view process") as caught:
            broken.open(0)
        assert caught.value.errno == errno.ENOTCONN


def test_a_kernel_without_passthrough() -> None:
    body = p.INIT_IN.pack(7, 39, 0, p.InitFlag.INIT_EXT, 0)
    header = p.IN_HEADER.pack(p.IN_HEADER.size + len(body), p.Opcode.INIT, 1, 0, 0, 0, 0, 0)
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.send(header + body)
    with kernel, device, pytest.raises(OSError, match=r"no FUSE passthrough \(Linux 6\.9"):
        ViewServer(device.fileno()).begin()
