"""kill -9 in the middle of a change: between the system call and the bump, where only the journal helps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from coherent_vfs.guest.guest import Guest
from tests.integration.coherenced_process import Coherenced, eventually
from tests.integration.user_guests import Backend, warm_up


@pytest.fixture
def share() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    (directory / "file").write_text("old")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Coherenced]:
    with Coherenced(tmp_path) as coherenced:
        coherenced.start()
        yield coherenced


@pytest.fixture
def backends(share: Path, tmp_path: Path, daemon: Coherenced) -> Iterator[tuple[Backend, Backend]]:
    with (
        Backend(share, tmp_path, name="a", cache="shared", daemon=daemon) as first,
        Backend(share, tmp_path, name="b", cache="shared", daemon=daemon) as second,
    ):
        yield first, second


@contextmanager
def held_after(backend: Backend, call: str) -> Iterator[None]:
    """Within: the backend stops after such a system call took effect, before it goes on. At the end it is killed."""
    assert backend.process is not None
    tracer = subprocess.Popen(
        ["strace", "-p", str(backend.process.pid), "-e", f"trace={call}", "-e", f"inject={call}:delay_exit=60s"],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    try:
        assert b"attached" in tracer.stderr.readline()
        yield
    finally:
        # The backend first, or it would go on; its parent sees its end only after that of its tracer.
        backend.process.kill()
        tracer.kill()
        tracer.wait()
        tracer.stderr.close()
        backend.process.wait()


def keep(witness: Guest) -> None:
    """Let a guest keep a file, and that another is not there."""

    def look() -> None:
        # Opening is a request each time; the contents are kept where the attributes are.
        witness.stat("file")
        witness.exists("moved")

    witness.read_bytes("file")
    warm_up(witness, look)


CHANGES: list[tuple[str, Callable[[Guest], object], Callable[[Path], bool], Callable[[Guest], bool]]] = [
    ("unlinkat", lambda g: g.unlink("file"), lambda s: not (s / "file").exists(), lambda g: not g.exists("file")),
    (
        "pwritev2",
        lambda g: g.open("file", os.O_WRONLY).pwrite(b"new content", 0),
        lambda s: (s / "file").read_text() == "new content",
        lambda g: g.stat("file").st_size == 11 and g.read_bytes("file") == b"new content",
    ),
    (
        "renameat",
        lambda g: g.rename("file", "moved"),
        lambda s: (s / "moved").exists(),
        lambda g: g.exists("moved") and not g.exists("file"),
    ),
    ("mkdirat", lambda g: g.mkdir("moved"), lambda s: (s / "moved").exists(), lambda g: g.exists("moved")),
]


@pytest.mark.parametrize(("call", "change", "took_effect", "seen"), CHANGES, ids=[call for call, *_ in CHANGES])
def test_a_backend_killed_between_its_system_call_and_its_bump(
    share: Path,
    backends: tuple[Backend, Backend],
    call: str,
    change: Callable[[Guest], object],
    took_effect: Callable[[Path], bool],
    seen: Callable[[Guest], bool],
) -> None:
    first, second = backends
    with second.connect() as witness:
        changer = first.connect()
        # The witness keeps all that it will be asked, what is not there included.
        keep(witness)

        def try_to_change() -> None:
            with suppress(OSError):
                change(changer)

        with held_after(first, call):
            thread = threading.Thread(target=try_to_change)
            thread.start()
            eventually(lambda: took_effect(share))
            # Nobody was told yet, so what the witness keeps may still be used: this is the gap to close.
            assert not seen(witness)
        thread.join()
        eventually(lambda: seen(witness))
        # And nothing has to be cleaned up by hand.
        first.start()
        with first.connect() as back:
            assert seen(back)
            back.write_bytes("after", b"!")
        assert witness.read_bytes("after") == b"!"


def test_a_guest_killed_while_it_changes_things(share: Path, backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    program = (
        "import sys; from coherent_vfs.guest.guest import Guest\n"
        "g = Guest.connect(sys.argv[1]); print('begun', flush=True)\n"
        "while True:\n"
        "    g.write_bytes('file', b'again and again'); g.rename('file', 'moved'); g.rename('moved', 'file')\n"
    )
    with second.connect() as witness:
        for _ in range(3):
            victim = subprocess.Popen([sys.executable, "-c", program, str(first.socket)], stdout=subprocess.PIPE)
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"begun\n"
            for _ in range(200):
                with suppress(FileNotFoundError):
                    witness.stat("file")
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            victim.stdout.close()
            with first.connect() as heir:
                # Whatever the dead guest's last request did is done, and told, before the next guest is served.
                heir.listdir("/")
                assert sorted(witness.listdir("/")) == sorted(path.name for path in share.iterdir())
                (name,) = witness.listdir("/")
                assert witness.read_bytes(name) == (share / name).read_bytes()
                if name == "moved":
                    heir.rename("moved", "file")


def test_backend_and_daemon_killed_in_the_middle_of_a_change(
    share: Path, backends: tuple[Backend, Backend], daemon: Coherenced
) -> None:
    """The daemon is not there to see the backend die: the next one finds the journal."""
    first, second = backends
    with second.connect() as witness:
        changer = first.connect()
        keep(witness)

        def unlink() -> None:
            with suppress(OSError):
                changer.unlink("file")

        with held_after(first, "unlinkat"):
            thread = threading.Thread(target=unlink)
            thread.start()
            eventually(lambda: not (share / "file").exists())
            daemon.kill()
            # At the latest when its backend has noticed, the witness trusts nothing.
            eventually(lambda: not witness.exists("file"))
        thread.join()
        daemon.start()
        assert not witness.exists("file")
        eventually(lambda: daemon.status().status.trusted)
        assert not witness.exists("file")
