"""coherencectl watch and top beside a real daemon, backends and user-space guests."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl.client import ask, connected
from coherent_vfs.coherence.ctl.top import COLUMNS
from coherent_vfs.coherence.protocol.connection import Connection, Dropped
from coherent_vfs.coherence.protocol.messages import FromDaemon, StatusQuestion, Subscribe, Subscribed
from coherent_vfs.guest.guest import Guest
from tests.integration.coherenced_process import SECONDS, Coherenced, Member, eventually
from tests.integration.user_guests import Backend, warm_up


def command(daemon: Coherenced, *arguments: str) -> list[str]:
    """A coherencectl's command line."""
    return [sys.executable, "-m", "coherent_vfs.coherence.ctl.main", *arguments, "--socket", str(daemon.socket)]


class Ctl:
    """A running coherencectl. A context that ends it.

    Attributes:
        lines: what it has printed so far.
    """

    def __init__(self, daemon: Coherenced, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command(daemon, *arguments),
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def end(self, number: int | None = None) -> int:
        """Send a signal, if there is one, and wait for the end; returns the exit status."""
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status

    def complaint(self) -> str:
        """What it wrote to stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


class Watch(Ctl):
    """coherencectl watch --json, from when it is told of what happens in a directory that is watched."""

    def __init__(self, daemon: Coherenced, directory: Path, *arguments: str) -> None:
        super().__init__(daemon, "watch", "--json", *arguments)
        self._marker = directory / "marker"
        eventually(self._told)
        self.lines.clear()

    def _told(self) -> bool:
        self._marker.touch()
        return bool(self.lines)

    @property
    def changes(self) -> set[tuple[str, str, str]]:
        """Who, what and where, but for the marker."""
        told = [json.loads(line) for line in list(self.lines)]
        return {(one["who"], one["what"], one["path"]) for one in told if one.get("path") != str(self._marker)}


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    (path / "d").mkdir(parents=True)
    return path


@pytest.fixture
def kind() -> str:
    """How the daemon watches the host."""
    return "inotify"


@pytest.fixture
def daemon(tmp_path: Path, kind: str) -> Iterator[Coherenced]:
    if kind == "fanotify" and os.geteuid() != 0:
        pytest.skip("fanotify needs root: run this as root")
    with Coherenced(tmp_path) as daemon:
        daemon.start("--watch", kind)
        yield daemon


@pytest.fixture
def member(daemon: Coherenced, share: Path) -> Iterator[Member]:
    """A backend without a guest, for which the share is watched."""
    with Member(daemon, "red") as member:
        member.do(f"watch {share}")
        yield member


@pytest.fixture
def guests(daemon: Coherenced, share: Path, tmp_path: Path) -> Iterator[list[Guest]]:
    """Two guests, red and blue, whose directory d is watched."""
    with ExitStack() as stack:
        guests = []
        for name in ("red", "blue"):
            backend = stack.enter_context(Backend(share, tmp_path, name=name, cache="shared", daemon=daemon))
            guests.append(stack.enter_context(backend.connect()))

        for guest in guests:
            warm_up(guest, lambda guest=guest: guest.exists("/d/nothing"))  # type: ignore[misc]
        yield guests


@pytest.mark.parametrize("kind", ["inotify", "fanotify"])
def test_who_changes_what(daemon: Coherenced, share: Path, guests: list[Guest], kind: str) -> None:
    red, blue = guests
    assert daemon.status().status.watch.kind == kind
    with Watch(daemon, share / "d") as watch:
        path = share / "d" / "f"
        red.write_bytes("/d/f", b"by red")
        eventually(lambda: {("red", "create", str(path)), ("red", "modify", str(path))} <= watch.changes)
        blue.chmod("/d/f", 0o600)
        eventually(lambda: ("blue", "attrib", str(path)) in watch.changes)
        path.write_text("on the host")
        eventually(lambda: ("host", "modify", str(path)) in watch.changes)
        blue.rename("/d/f", "/d/g")
        moved = {("blue", "move from", str(path)), ("blue", "move to", str(share / "d" / "g"))}
        eventually(lambda: moved <= watch.changes)
        (share / "d" / "g").unlink()
        eventually(lambda: ("host", "delete", str(share / "d" / "g")) in watch.changes)
        assert watch.end(signal.SIGINT) == 0
        assert watch.complaint() == ""


def test_only_what_is_under_a_path(daemon: Coherenced, share: Path, member: Member) -> None:
    member.do(f"watch {share / 'd'}")
    with Watch(daemon, share / "d", str(share / "d")) as watch:
        (share / "dd").touch()
        (share / "d" / "f").touch()
        eventually(lambda: ("host", "create", str(share / "d" / "f")) in watch.changes)
        assert not [path for _, _, path in watch.changes if path == str(share / "dd")]


def test_what_happens_where_nobody_watches_is_not_shown(daemon: Coherenced, share: Path, member: Member) -> None:
    with Watch(daemon, share) as watch:
        (share / "d" / "f").touch()
        (share / "after").touch()
        eventually(lambda: ("host", "create", str(share / "after")) in watch.changes)
        assert not [path for _, _, path in watch.changes if path.startswith(str(share / "d" / "f"))]


def test_for_people_it_is_a_line_each(daemon: Coherenced, share: Path, member: Member) -> None:
    with Ctl(daemon, "watch") as watch:

        def shown() -> bool:
            (share / "evil\x1b[2J").touch()
            return any(f"  host          attrib     {share}/evil\\x1b[2J" in line for line in watch.lines)

        eventually(shown)


def own_memory(daemon: Coherenced) -> int:
    """What it has of its own, without the shared memory that it touches, bytes."""
    assert daemon.process is not None
    text = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (kilobytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(kilobytes)


def test_who_does_not_read_is_told_how_many_it_missed(daemon: Coherenced, share: Path, member: Member) -> None:
    with Watch(daemon, share) as slow, Watch(daemon, share) as quick:
        slow.process.send_signal(signal.SIGSTOP)
        before = own_memory(daemon)
        directory = os.open(share, os.O_PATH)
        count = 6_000
        for number in range(count):
            path = f"{number}-{'x' * 200}"
            os.mknod(path, dir_fd=directory)
            if number % 250 == 249:
                # The daemon goes on: not even its queue of changes overflows.
                eventually(lambda path=path: any(path in line for line in quick.lines[-1:]))  # type: ignore[misc]
        os.close(directory)
        assert daemon.status().status.watch.overflows == 0
        assert own_memory(daemon) - before < 10 << 20
        slow.process.send_signal(signal.SIGCONT)
        eventually(lambda: "missed" in slow.lines[-1])
        *shown, missed = [json.loads(line) for line in slow.lines]
        shown = [one for one in shown if one["path"].endswith("xxx")]
        assert shown == [json.loads(line) for line in quick.lines if line.endswith('xxx","times":1}')][: len(shown)]
        assert 0 < missed["missed"] <= count - len(shown) + 10
        # From now on it is told again.
        (share / "later").touch()
        eventually(lambda: any('/later"' in line for line in slow.lines))
        assert not any("missed" in line for line in quick.lines)


def test_a_reload_changes_nothing(daemon: Coherenced, share: Path, member: Member) -> None:
    assert daemon.process is not None
    with Watch(daemon, share) as watch:
        daemon.process.send_signal(signal.SIGHUP)
        daemon.manager.wait_for("RELOADING=1")
        daemon.manager.wait_for("READY=1")
        (share / "f").touch()
        eventually(lambda: ("host", "create", str(share / "f")) in watch.changes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_daemon_goes_away(daemon: Coherenced, share: Path, member: Member, number: int) -> None:
    with Watch(daemon, share) as watch, Ctl(daemon, "top", "--json", "--interval", "0.1") as top:
        eventually(lambda: bool(top.lines))
        daemon.stop(number)
        for one in (watch, top):
            assert one.end() == 1
            complaint = one.complaint()
            assert complaint.startswith("coherencectl: ") and complaint.count("\n") == 1
            assert "ended the connection" in complaint or "no coherenced at" in complaint


@pytest.mark.parametrize("what", [["watch"], ["top", "--interval", "0.1"]])
def test_nobody_reads_what_it_prints(daemon: Coherenced, share: Path, member: Member, what: list[str]) -> None:
    process = subprocess.Popen(command(daemon, *what), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()

    def ended() -> bool:
        (share / "f").touch()
        return process.poll() is not None

    eventually(ended)
    assert (process.returncode, process.stderr.read()) == (0, "")
    process.stderr.close()


@pytest.mark.parametrize("what", ["status", "top"])
def test_what_it_prints_goes_nowhere(daemon: Coherenced, what: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(daemon, what), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "coherencectl: standard output: No space left on device: write elsewhere\n",
    )


def test_names_that_the_terminal_cannot_show(daemon: Coherenced, share: Path, member: Member) -> None:
    with Ctl(daemon, "watch", environment={"PYTHONIOENCODING": "ascii"}) as watch:

        def shown() -> bool:
            (share / "é").touch()
            return any(f"{share}/\\xe9" in line for line in watch.lines)

        eventually(shown)


def test_a_daemon_that_sees_nothing_says_so(tmp_path: Path) -> None:
    with Coherenced(tmp_path) as daemon:
        daemon.start("--watch", "none")
        with Ctl(daemon, "watch") as watch:
            assert watch.end() == 1
            assert "coherenced runs with --watch none" in watch.complaint()


def test_there_are_not_too_many(daemon: Coherenced) -> None:
    with ExitStack() as stack:
        for _ in range(16):
            ask(stack.enter_context(connected(daemon.socket)), Subscribe(), Subscribed)
        with pytest.raises(UserError, match="16 clients watch changes already"), connected(daemon.socket) as late:
            ask(late, Subscribe(), Subscribed)
    with connected(daemon.socket) as free:
        ask(free, Subscribe(), Subscribed)


@pytest.mark.parametrize("second", [Subscribe(), StatusQuestion(), Subscribe(b"x" * 5000)])
def test_a_subscriber_that_says_more_is_dropped(daemon: Coherenced, second: Subscribe | StatusQuestion) -> None:
    with pytest.raises(UserError, match="ended the connection"), connected(daemon.socket) as client:
        ask(client, Subscribe(), Subscribed)
        client.send(second)
        told(client)
    assert daemon.status().status.trusted


def told(client: Connection[FromDaemon]) -> None:
    """Read until the connection is over."""
    while True:
        client.receive()


def test_a_subscriber_that_closes_its_half(daemon: Coherenced, share: Path, member: Member) -> None:
    with connected(daemon.socket) as client, Watch(daemon, share) as watch:
        ask(client, Subscribe(), Subscribed)
        client._sock.shutdown(0)
        (share / "f").touch()
        eventually(lambda: ("host", "create", str(share / "f")) in watch.changes)
        with pytest.raises(Dropped):
            for _ in range(1000):
                client.send(Subscribe())
    assert "Traceback" not in daemon.log()


def test_top_shows_who_writes(daemon: Coherenced, guests: list[Guest]) -> None:
    red, blue = guests
    done = threading.Event()

    def work() -> None:
        number = 0
        while not done.is_set():
            red.write_bytes("/d/f", b"%d" % number)
            blue.read_bytes("/d/f")
            number += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with Ctl(daemon, "top", "--json", "--interval", "0.2") as top, Ctl(daemon, "top", "--once") as once:
            # On a busy machine a guest may do nothing for so long, or its backend not answer.
            eventually(lambda: any(map(shows_who_writes, list(top.lines))))
            assert once.end() == 0
            assert top.end(signal.SIGINT) == 0
            assert top.complaint() == ""
    finally:
        done.set()
        worker.join()
    assert tuple(once.lines[4].split()) == COLUMNS
    assert {line.split()[0] for line in once.lines[5:]} == {"red", "blue"}


def shows_who_writes(line: str) -> bool:
    """Whether red changes things, so that blue asks again each time."""
    view = json.loads(line)
    assert view["domain"]["watches"] == 2
    red, blue = view["guests"]
    if not red["changes_per_second"] or not blue["requests_per_second"]:
        return False
    assert view["domain"]["bumps_per_second"] > 0
    assert (red["guest"], red["kind"], red["cache"]) == ("red", "aware", "shared")
    assert (blue["guest"], blue["changes_per_second"]) == ("blue", 0)
    return True


def test_top_on_a_terminal(daemon: Coherenced, member: Member) -> None:
    main, terminal = pty.openpty()
    process = subprocess.Popen(command(daemon, "top", "--interval", "0.1"), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while shown.count(b"\x1b[H\x1b[J") < 3:
        shown += os.read(main, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0
    os.close(main)
    assert b"GUEST" in shown
    assert b"Traceback" not in shown
