"""User-space guests on real back-ends: every operation in every cache mode, what each mode keeps, and deaths."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.guest.fuse_client import Entry, Opened
from coherent_vfs.guest.guest import Guest
from coherent_vfs.guest.transport import VirtioTransport
from coherent_vfs.server.fuse.protocol import Opcode
from tests.integration.coherenced_process import SECONDS, Coherenced, eventually
from tests.integration.user_guests import Backend, requests_of, warm_up

MODES = ("none", "auto", "always", "shared", "aware")
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


@pytest.fixture(scope="module", params=MODES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A back-end in each mode; in "aware" its guests prove that they check the table, in "shared" they do not."""
    mode = request.param
    directory = tmp_path_factory.mktemp(mode)
    with ExitStack() as stack:
        share = stack.enter_context(directory_on_disk())
        daemon = None
        if mode in ("shared", "aware"):
            daemon = stack.enter_context(Coherenced(directory))
            daemon.start()
        cache = "shared" if mode == "aware" else mode
        yield stack.enter_context(Backend(share, directory, cache=cache, daemon=daemon))


@contextmanager
def directory_on_disk() -> Iterator[Path]:
    """An empty directory on a file system with extended attributes."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def share(request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory: what the test's back-end serves, where there is one for all tests."""
    if "served" not in request.fixturenames:
        with directory_on_disk() as directory:
            yield directory
        return
    directory = request.getfixturevalue("served").share
    yield directory
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Coherenced]:
    """A running coherenced."""
    with Coherenced(tmp_path) as coherenced:
        coherenced.start()
        yield coherenced


@pytest.fixture
def guest(served: Backend, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest on the back-end."""
    aware = request.node.callspec.params["served"] == "aware"
    with served.connect(aware=aware) as connected:
        assert connected.aware == aware
        yield connected


def error_of(kind: int) -> pytest.RaisesExc[OSError]:
    """Expect an OSError of this errno, which names its path."""
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == kind and error.filename is not None)


def test_names(guest: Guest, share: Path) -> None:
    guest.mkdir("/d", 0o700)
    assert stat.S_IMODE((share / "d").stat().st_mode) == 0o700
    guest.write_bytes("/d/f", b"content")
    assert (share / "d/f").read_bytes() == b"content"
    guest.link("/d/f", "/h")
    assert guest.stat("/h").st_nlink == guest.stat("/d/f").st_nlink == 2
    guest.symlink("d/f", "/l")
    assert guest.readlink("/l") == "d/f"
    assert guest.stat("/l").st_ino == guest.stat("/h").st_ino != guest.lstat("/l").st_ino
    guest.rename("/h", "/d/g")
    assert not guest.exists("/h")
    guest.write_bytes("/x", b"other")
    guest.rename("/x", "/d/g", flags=RENAME_EXCHANGE)
    assert guest.read_bytes("/x") == b"content"
    assert guest.read_bytes("/d/g") == b"other"
    guest.rename("/x", "/d/g")
    assert sorted(guest.listdir("/d")) == ["f", "g"]
    assert [(entry.name, entry.is_dir(), entry.stat().st_size) for entry in guest.scandir("/d")] in (
        [("f", False, 7), ("g", False, 7)],
        [("g", False, 7), ("f", False, 7)],
    )
    guest.unlink("/d/g")
    assert guest.stat("/d/f").st_nlink == 1
    guest.unlink("/d/f")
    assert guest.listdir("/d") == []
    guest.rmdir("/d")
    assert sorted(guest.listdir()) == ["l"]
    guest.mknod("/fifo", stat.S_IFIFO | 0o640)
    assert stat.S_ISFIFO((share / "fifo").stat().st_mode)
    guest.mknod("/device", stat.S_IFCHR | 0o600, os.makedev(259, 300))
    assert guest.stat("/device").st_rdev == (share / "device").stat().st_rdev == os.makedev(259, 300)


def test_errors_are_those_of_the_system_call_and_name_the_path(guest: Guest) -> None:
    guest.mkdir("/d")
    guest.write_bytes("/d/f", b"")
    guest.symlink("loop", "/loop")
    with error_of(errno.ENOENT):
        guest.stat("/nothing")
    with error_of(errno.ENOENT):
        guest.open("/nothing")
    with error_of(errno.ENOTDIR):
        guest.stat("/d/f/x")
    with error_of(errno.ENOTDIR):
        guest.stat("/d/f/")
    with error_of(errno.EEXIST):
        guest.mkdir("/d")
    with error_of(errno.EEXIST):
        guest.open("/d/f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with error_of(errno.EEXIST):
        guest.rename("/d", "/d/f", flags=RENAME_NOREPLACE)
    with error_of(errno.ENOTEMPTY):
        guest.rmdir("/d")
    with error_of(errno.EISDIR):
        guest.unlink("/d")
    with error_of(errno.EISDIR):
        guest.open("/d")
    with error_of(errno.ENOTDIR):
        guest.rmdir("/d/f")
    with error_of(errno.ELOOP):
        guest.stat("/loop")
    with error_of(errno.ELOOP):
        guest.open("/loop", os.O_NOFOLLOW)
    with error_of(errno.EINVAL):
        guest.readlink("/d/f")
    with error_of(errno.ENAMETOOLONG):
        guest.stat("/" + 256 * "x")
    with error_of(errno.ENODATA):
        guest.getxattr("/d/f", "user.none")
    with error_of(errno.EBUSY):
        guest.rmdir("/")
    with error_of(errno.ENOENT):
        guest.stat("")
    with guest.open("/d/f") as file, error_of(errno.EBADF):
        file.write(b"read-only")


def test_attributes(guest: Guest, share: Path) -> None:
    guest.write_bytes("/f", b"12345")
    path = share / "f"
    guest.chmod("/f", 0o4711)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(guest.stat("/f").st_mode) == 0o4711
    guest.chown("/f", 12, -1)
    guest.chown("/f", -1, 34)
    assert (path.stat().st_uid, guest.stat("/f").st_gid) == (12, 34)
    guest.utime("/f", ns=(1_500_000_000, -2_000_000_001))
    assert (path.stat().st_atime_ns, guest.stat("/f").st_mtime_ns) == (1_500_000_000, -2_000_000_001)
    before = time.time()
    guest.utime("/f")
    # The kernel's clock for files is some ticks late.
    assert before - 1 < guest.stat("/f").st_mtime <= time.time()
    guest.truncate("/f", 3)
    assert path.read_bytes() == b"123"
    guest.truncate("/f", 5)
    assert guest.read_bytes("/f") == b"123\0\0"
    assert guest.stat("/f").st_size == 5
    guest.setxattr("/f", "user.a", b"value")
    guest.setxattr("/f", "user.empty", b"", os.XATTR_CREATE)
    assert sorted(guest.listxattr("/f")) == ["user.a", "user.empty"]
    assert guest.getxattr("/f", "user.a") == os.getxattr(path, "user.a") == b"value"
    guest.removexattr("/f", "user.a")
    assert guest.listxattr("/f") == ["user.empty"]
    assert guest.access("/f", os.R_OK)
    assert guest.statvfs().f_blocks == os.statvfs(share).f_blocks
    seen, there = guest.stat("/f"), path.stat()
    for name in ("st_ino", "st_nlink", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize", "st_mtime"):
        assert getattr(seen, name) == getattr(there, name), name


def test_files(guest: Guest, share: Path) -> None:
    data = os.urandom(3_000_001)
    with guest.open("/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666) as file:
        assert file.write(data) == file.tell() == len(data)
        assert file.pread(len(data) + 10, 0) == data
        assert file.pread(5000, 1_234_567) == data[1_234_567:1_239_567]
        assert file.read() == b""
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read(4) + file.read() == data[-10:]
        file.pwrite(b"patch", 4094)
        assert file.pread(9, 4092) == data[4092:4094] + b"patch" + data[4099:4101]
        file.truncate(10_000)
        assert file.stat().st_size == len(file.pread(20_000, 0)) == 10_000
        file.fallocate(0, 0, 20_000)
        assert file.stat().st_size == 20_000
        file.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 8192)
        assert file.seek(0, os.SEEK_DATA) == 8192
        assert file.seek(0, os.SEEK_HOLE) == 0
        file.fsync()
        file.fsync(datasync=True)
    assert stat.S_IMODE((share / "f").stat().st_mode) == 0o644
    with guest.open("/f", os.O_WRONLY | os.O_APPEND) as file:
        file.write(b"end")
    with guest.open("/f") as source, guest.open("/copy", os.O_RDWR | os.O_CREAT) as target:
        assert guest.copy_file_range(source, target, 100, 8192, 1) == 100
        assert target.pread(200, 0) == b"\0" + source.pread(100, 8192)
        assert source.pread(10, 20_000) == b"end"
    with guest.open("/f", os.O_RDWR | os.O_TRUNC) as file:
        assert file.stat().st_size == 0
        guest.unlink("/f")
        file.write(b"still open")
        assert file.pread(100, 0) == b"still open"
        assert file.stat().st_nlink == 0
    with guest.open("/", os.O_TMPFILE | os.O_RDWR, 0o600) as file:
        file.write(b"nameless")
        guest.link(file, "/named")
    assert (share / "named").read_bytes() == b"nameless"
    guest.fsync_directory("/")
    guest.sync()


def test_new_files_belong_to_the_caller(guest: Guest, share: Path) -> None:
    share.chmod(0o777)
    with guest.caller(1000, 1001, 0o027):
        guest.write_bytes("/f", b"")
        guest.mkdir("/d")
        guest.symlink("f", "/l")
    for name, mode in (("f", 0o640), ("d", 0o750)):
        seen = guest.stat(name)
        assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (1000, 1001, mode)
    assert (share / "l").lstat().st_uid == 1000


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_file_that_another_makes_between_lookup_and_create(
    guest: Guest, share: Path, monkeypatch: pytest.MonkeyPatch, vanishes: bool
) -> None:
    """The server answers ESTALE to anybody but root, whose right to open it nobody has checked."""
    share.chmod(0o777)
    create = guest.client.create
    lookup = guest.client.lookup

    def late(directory: int, name: bytes, flags: int, mode: int) -> tuple[Entry, Opened]:
        if guest.requests[Opcode.CREATE] == before:
            (share / "f").write_bytes(b"theirs")
        return create(directory, name, flags, mode)

    def gone(directory: int, name: bytes) -> Entry:
        if vanishes:
            (share / "f").unlink(missing_ok=True)
        return lookup(directory, name)

    assert not guest.exists("/f")
    before = guest.requests[Opcode.CREATE]
    monkeypatch.setattr(guest.client, "create", late)
    monkeypatch.setattr(guest.client, "lookup", gone)
    with guest.caller(1000, 1000), guest.open("/f", os.O_RDWR | os.O_CREAT) as file:
        assert file.read() == (b"" if vanishes else b"theirs")
        assert file.stat().st_uid == (1000 if vanishes else 0)
    assert guest.requests[Opcode.CREATE] == before + 1 + vanishes


def test_a_large_directory(guest: Guest, share: Path) -> None:
    names = {f"{number:05}-{'x' * 240}" for number in range(700)}
    (share / "d").mkdir()
    for name in names:
        (share / "d" / name).touch()
    assert set(guest.listdir("/d")) == names
    assert {entry.name for entry in guest.scandir("/d")} == names


def test_paths(guest: Guest, share: Path) -> None:
    (share / "d/e").mkdir(parents=True)
    (share / "d/e/f").write_bytes(b"deep")
    (share / "d/up").symlink_to("../d/e")
    (share / "top").symlink_to("/d")
    number = (share / "d/e/f").stat().st_ino
    for path in ("d/e/f", "/d//e/./f", "/../d/up/f", "/top/up/f", "/d/e/../e/f", b"/d/e/f", Path("/d/e/f")):
        assert guest.stat(path).st_ino == number
    assert guest.stat("/top/").st_ino == guest.stat("/d/up/..").st_ino == (share / "d").stat().st_ino
    with pytest.raises(ValueError, match="null"):
        guest.stat("a\0b")
    with guest.open("/top/up/new", os.O_CREAT | os.O_WRONLY):
        assert (share / "d/e/new").exists()


def test_several_threads_share_a_guest(guest: Guest, share: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                path = f"/{number}-{turn}"
                guest.write_bytes(path, bytes([number]) * 9000)
                assert guest.read_bytes(path) == bytes([number]) * 9000
                guest.rename(path, f"{path}.new")
                assert not guest.exists(path)
                assert guest.stat(f"{path}.new").st_size == 9000
                guest.unlink(f"{path}.new")
                guest.listdir("/")
        except BaseException as error:
            failures.append(error)

    # More threads than a queue has slots.
    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(share.iterdir()) == []


def test_requests_go_over_several_queues(share: Path, tmp_path: Path) -> None:
    options = ("--num-request-queues", "3")
    with Backend(share, tmp_path, options=options) as backend, backend.connect(request_queues=3) as guest:
        for number in range(9):
            guest.write_bytes(f"/{number}", bytes([number]))
        assert [guest.read_bytes(f"/{number}") for number in range(9)] == [bytes([n]) for n in range(9)]


@pytest.mark.parametrize("minor", [27, 31, 35, 36, 45, 99])
def test_guests_of_any_version(share: Path, tmp_path: Path, minor: int) -> None:
    with Backend(share, tmp_path) as backend, Guest.connect(backend.socket, minor=minor) as guest:
        assert guest.client.minor == min(minor, 45)
        guest.write_bytes("/f", bytes(300_000))
        guest.setxattr("/f", "user.a", b"1")
        assert guest.getxattr("/f", "user.a") == b"1"
        assert guest.read_bytes("/f") == bytes(300_000)
        assert [(entry.name, entry.stat().st_size) for entry in guest.scandir("/")] == [("f", 300_000)]
        # What it means is over: nothing happens.
        guest.client.interrupt(2)
        assert guest.listdir("/") == ["f"]


def test_everything_looked_up_is_forgotten(guest: Guest, share: Path) -> None:
    (share / "d").mkdir()
    for number in range(300):
        (share / f"d/{number}").touch()
    for entry in guest.scandir("/d"):
        entry.stat()
    guest.drop_caches()
    count = guest.requests[Opcode.FORGET] + guest.requests[Opcode.BATCH_FORGET]
    assert count > 0
    assert not guest.client.forgotten
    guest.drop_caches()
    assert guest.requests[Opcode.FORGET] + guest.requests[Opcode.BATCH_FORGET] == count
    assert guest.stat("/d/5").st_nlink == 1


# --- what each mode keeps ------------------------------------------------------------------------


def read_twice(guest: Guest) -> int:
    """How many requests a second look at everything takes."""
    with guest.open("/d/f") as file:
        for _ in range(2):
            before = guest.requests.total()
            guest.stat("/d/f")
            file.pread(100, 0)
        return guest.requests.total() - before


@pytest.mark.parametrize(("mode", "requests"), [("none", 3), ("auto", 0), ("always", 0)])
def test_what_is_kept_by_time(share: Path, tmp_path: Path, mode: str, requests: int) -> None:
    (share / "d").mkdir()
    (share / "d/f").write_bytes(b"old")
    options = () if mode == "none" else ("--timeout", "100")
    with Backend(share, tmp_path, cache=mode, options=options) as backend, backend.connect() as guest:
        # In none: two LOOKUPs and a READ, and the FORGETs of the LOOKUPs before.
        sent = read_twice(guest)
        assert sent == requests or (mode == "none" and sent == requests + 1)
        with (share / "d/f").open("r+b") as file:
            file.write(b"new, longer")
        (share / "d/g").touch()
        assert guest.stat("/d/f").st_size == (11 if mode == "none" else 3)
        content = guest.read_bytes("/d/f")
        # Close to open, but always keeps what it has.
        assert content == (b"old" if mode == "always" else b"new, longer")


def test_auto_sees_a_change_when_the_time_is_over(share: Path, tmp_path: Path) -> None:
    (share / "f").write_bytes(b"old")
    options = ("--timeout", "0.2")
    with Backend(share, tmp_path, cache="auto", options=options) as backend, backend.connect() as guest:
        with guest.open("/f") as file:
            assert file.pread(100, 0) == b"old"
            (share / "f").write_bytes(b"newer")
            eventually(lambda: guest.stat("/f").st_size == 5)
            assert file.pread(100, 0) == b"newer"
        (share / "f").unlink()
        eventually(lambda: not guest.exists("/f"))


def test_a_guest_that_checks_the_table_sends_nothing_until_something_changes(
    share: Path, tmp_path: Path, daemon: Coherenced
) -> None:
    (share / "d").mkdir()
    (share / "d/f").write_bytes(b"old")
    (share / "d/l").symlink_to("f")

    def look(guest: Guest) -> tuple[object, ...]:
        seen = guest.stat("/d/l").st_size, guest.listdir("/d"), guest.readlink("/d/l"), guest.exists("/d/nothing")
        return (*seen, guest.stat("/").st_nlink)

    with (
        Backend(share, tmp_path, name="a", cache="shared", daemon=daemon) as one,
        Backend(share, tmp_path, name="b", cache="shared", daemon=daemon) as two,
        one.connect() as guest,
        two.connect() as other,
    ):
        seen = look(guest)
        warm_up(guest, lambda: look(guest))
        assert read_twice(guest) == 0
        before = guest.requests.copy()
        assert look(guest) == seen
        assert guest.requests == before
        other.write_bytes("/d/nothing", b"")
        other.write_bytes("/d/f", b"newer")
        assert guest.exists("/d/nothing")
        assert guest.stat("/d/l").st_size == 5
        assert guest.read_bytes("/d/f") == b"newer"
        assert "nothing" in guest.listdir("/d")


def test_a_guest_that_does_not_check_keeps_what_is_leased_in_shared(
    share: Path, tmp_path: Path, daemon: Coherenced
) -> None:
    (share / "d").mkdir()
    (share / "d/f").write_bytes(b"old")

    def look(guest: Guest) -> tuple[int, list[str]]:
        return guest.stat("/d/f").st_size, guest.listdir("/d")

    with (
        Backend(share, tmp_path, name="a", cache="shared", daemon=daemon) as one,
        Backend(share, tmp_path, name="b", cache="shared", daemon=daemon) as two,
        one.connect(aware=False) as guest,
        two.connect(aware=False) as other,
    ):
        assert requests_of(guest, lambda: guest.stat("/d/f"))
        assert other.stat("/d/f").st_size == 3
        warm_up(guest, lambda: guest.stat("/d/f"))
        for size in range(4, 7):
            other.write_bytes("/d/f", bytes(size))
            assert guest.stat("/d/f").st_size == size
            assert guest.read_bytes("/d/f") == bytes(size)
        assert guest.listdir("/d") == ["f"]
        # A lease on a name that is not there is no obstacle to the guest that has it, only to others.
        warm_up(guest, lambda: guest.exists("/d/g"))
        other.write_bytes("/d/g", b"")
        assert guest.exists("/d/g")
        assert sorted(guest.listdir("/d")) == ["f", "g"]
        assert daemon.counters("a")["leases"]


def test_in_shared_a_guest_that_does_not_check_sees_changes_on_the_host_as_in_auto(
    share: Path, tmp_path: Path, daemon: Coherenced
) -> None:
    (share / "f").write_bytes(b"old")
    with (
        Backend(share, tmp_path, cache="shared", daemon=daemon) as backend,
        backend.connect(aware=False) as guest,
    ):
        warm_up(guest, lambda: guest.stat("/f"))
        (share / "f").write_bytes(b"newer")
        # At the latest when the lease is over.
        eventually(lambda: guest.stat("/f").st_size == 5)
        assert guest.read_bytes("/f") == b"newer"


def test_a_table_of_another_domain_is_no_proof(share: Path, tmp_path: Path, daemon: Coherenced) -> None:
    with Coherenced(tmp_path) as stranger:
        stranger.start()
        with Backend(share, tmp_path, cache="shared", daemon=daemon) as backend:
            with Guest.connect(backend.socket, table=stranger.paths.table) as guest:
                assert not guest.aware
            with backend.connect() as guest:
                assert guest.aware


# --- deaths --------------------------------------------------------------------------------------


def test_a_dead_backend_is_an_error_and_a_new_one_can_be_used(served: Backend, share: Path) -> None:
    (share / "f").write_bytes(b"content")
    with served.connect(aware=False) as guest:
        guest.stat("/f")
        failures: list[int | None] = []

        def work() -> None:
            try:
                while True:
                    guest.client.getattr(1)
            except OSError as error:
                failures.append(error.errno)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: guest.requests[Opcode.GETATTR] > 100)
        served.kill()
        for thread in threads:
            thread.join(SECONDS)
        assert failures == 3 * [errno.ENOTCONN]
        with error_of(errno.ENOTCONN):
            guest.statvfs("/")
    with pytest.raises(UserError, match="no backend"):
        served.connect(aware=False)
    served.start()
    with served.connect(aware=False) as guest:
        assert guest.read_bytes("/f") == b"content"


def test_a_backend_killed_in_the_middle_of_changes_leaves_nothing_stale(
    share: Path, tmp_path: Path, daemon: Coherenced
) -> None:
    names = [f"f{number}" for number in range(6)]
    with (
        Backend(share, tmp_path, name="a", cache="shared", daemon=daemon) as backend,
        Backend(share, tmp_path, name="b", cache="shared", daemon=daemon) as other,
        other.connect() as witness,
    ):

        def work(guest: Guest, seed: int) -> None:
            chance = random.Random(seed)
            while True:
                one, two = chance.sample(names, 2)
                try:
                    guest.write_bytes(one, bytes(chance.randrange(5000)))
                    guest.rename(one, two)
                    guest.unlink(chance.choice(names))
                except FileNotFoundError:
                    continue
                except OSError:
                    return

        def seen() -> list[tuple[int, int] | None]:
            found = [witness.stat(name) if witness.exists(name) else None for name in names]
            return [each and (each.st_ino, each.st_size) for each in found]

        def there() -> list[tuple[int, int] | None]:
            found = [(share / name).stat() if (share / name).exists() else None for name in names]
            return [each and (each.st_ino, each.st_size) for each in found]

        for turn in range(5):
            with backend.connect() as guest:
                threads = [threading.Thread(target=work, args=(guest, 10 * turn + seed)) for seed in range(3)]
                for thread in threads:
                    thread.start()
                while guest.requests.total() < 300 + 77 * turn:
                    for name in names:
                        witness.exists(name)
                backend.kill()
                for thread in threads:
                    thread.join(SECONDS)
            eventually(lambda: len(daemon.status().backends) == 1)
            assert seen() == there()
            assert sorted(witness.listdir()) == sorted(path.name for path in share.iterdir())
            backend.start()


def test_a_backend_that_does_not_answer_is_an_error(share: Path, tmp_path: Path) -> None:
    with Backend(share, tmp_path) as backend, backend.connect() as guest:
        transport = guest.client.transport
        assert isinstance(transport, VirtioTransport)

        def wait_for(seconds: float) -> None:
            for queue in transport._queues:
                queue._timeout = seconds

        assert backend.process is not None
        backend.process.send_signal(signal.SIGSTOP)
        wait_for(0.3)
        with error_of(errno.ETIMEDOUT):
            guest.stat("/")
        wait_for(SECONDS)
        backend.process.send_signal(signal.SIGCONT)
        # The late answer is taken for no other request's.
        eventually(lambda: guest.exists("/"))
        assert stat.S_ISDIR(guest.stat("/").st_mode)


def test_after_the_daemon_died_guests_ask_and_when_it_is_back_they_need_not(
    share: Path, tmp_path: Path, daemon: Coherenced
) -> None:
    (share / "f").write_bytes(b"old")
    with Backend(share, tmp_path, cache="shared", daemon=daemon) as backend, backend.connect() as guest:

        def asks() -> bool:
            return bool(requests_of(guest, lambda: guest.stat("/f")))

        warm_up(guest, lambda: guest.stat("/f"))
        daemon.kill()
        eventually(asks)
        (share / "f").write_bytes(b"newer")
        assert guest.stat("/f").st_size == 5
        daemon.start()
        eventually(lambda: not asks())
