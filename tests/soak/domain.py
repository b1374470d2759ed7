"""A coherenced, backends with small windows and their guests, each of which can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import msgspec

from coherent_vfs.coherence.ctl.client import DaxReport, fetch_dax
from coherent_vfs.coherence.protocol.constants import CHUNK
from tests.integration.coherenced_process import SECONDS, Coherenced
from tests.integration.user_guests import Backend
from tests.soak.files import FILES, Model
from tests.soak.messages import Command, Told

WINDOW: Final = 8 * CHUNK
"""Of each guest."""
LATE: Final = "does not give up what it has mapped in time"
"""What coherenced writes of a backend for which it did not wait any longer."""


class Failed(Exception):
    """Something that must hold does not; the message says what."""


class Member:
    """A guest, in a process of its own, and its backend.

    Attributes:
        number: from 1.
        name: of the guest.
        backend: its backend.
        counts: what the guest has told that it did, in all of its lives.
        backend_killed: when, by the monotonic clock.
    """

    def __init__(self, domain: Domain, number: int) -> None:
        self.number = number
        self.name = f"g{number}"
        self._domain = domain
        self._log = domain.folder / f"{self.name}.guest.log"
        self.backend = domain.backend(self.name)
        self.counts: Counter[str] = Counter()
        self.backend_killed = -SECONDS
        self._guest: subprocess.Popen[bytes] | None = None

    def start_backend(self) -> None:
        self.backend.start()
        process = self.backend.process
        assert process is not None
        self._domain.remember(process.pid)

    def kill_backend(self) -> None:
        """kill -9."""
        self.backend_killed = time.monotonic()
        self.backend.kill()

    @property
    def mounted(self) -> float:
        """When its guest began its session, by the monotonic clock."""
        return float((self._domain.folder / f"{self.number}.mounted").read_text())

    def start_guest(self) -> None:
        command = [sys.executable, "-m", "tests.soak.actor", str(self.number), str(self.backend.socket)]
        command += [str(self._domain.daemon.paths.table), str(self._domain.folder), self._domain.seed]
        with self._log.open("ab") as log:
            self._guest = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def kill_guest(self) -> None:
        """kill -9."""
        if self._guest is not None:
            self._guest.kill()
            self._end_guest(self._guest)

    def died(self) -> bool:
        """Whether the guest was killed by its window, as it may be: it is started again. Failed for another end."""
        guest = self._guest
        if guest is None or guest.poll() is None:
            return False
        self._end_guest(guest)
        if guest.returncode != -signal.SIGBUS:
            raise Failed(f"guest {self.name} has ended with status {guest.returncode}: {self.log()[-3000:]}")
        self._domain.bus_error(self)
        self.start_guest()
        return True

    def ask(self) -> Told:
        """Have the guest stand still, and tell what it has mapped."""
        guest = self._guest
        assert guest is not None
        assert guest.stdout is not None
        try:
            self.say("tell")
            line = guest.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            guest.wait(SECONDS)
            self.died()
            return self.ask()
        told = msgspec.json.decode(line, type=Told)
        self.counts.update(told.counts)
        return told

    def say(self, command: Command) -> None:
        guest = self._guest
        assert guest is not None
        assert guest.stdin is not None
        guest.stdin.write(msgspec.json.encode(command) + b"\n")
        guest.stdin.flush()

    def log(self) -> str:
        """What the guest wrote, in all of its lives."""
        return self._log.read_text()

    def end_guest(self) -> None:
        """Have it unmount and end."""
        guest = self._guest
        assert guest is not None
        self.say("end")
        guest.wait(SECONDS)
        if guest.returncode:
            raise Failed(f"guest {self.name} ended with status {guest.returncode}: {self.log()[-3000:]}")
        self._end_guest(guest)

    def _end_guest(self, guest: subprocess.Popen[bytes]) -> None:
        guest.wait()
        for stream in (guest.stdin, guest.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        self._guest = None


class Domain:
    """All of it. A context that leaves nothing behind.

    Args:
        folder: for everything, on a disk, as what is shared is.
        guests: how many.
        seed: decides what guests do.

    Attributes:
        share: the directory that is shared.
        daemon: coherenced.
        fresh: its descriptors before it was asked for anything.
        members: guests and backends.
        models: of the exact files.
        processes: all that backends have started in all of their lives, themselves too: when each was started, by pid.
        views: minor device numbers of the mounts of all view processes so far.
        semaphores: keys that all backends so far had.
        bus_errors: guests that died of mappings that were not revoked, as something had been killed.
    """

    def __init__(self, folder: Path, guests: int, seed: str) -> None:
        self.folder = folder
        self.seed = seed
        self.share = folder / "share"
        for directory in (self.share, folder / "models"):
            directory.mkdir()
        self._limits = ("--dax-window", str(WINDOW), "--dax-total", str(guests * WINDOW))
        self.processes: dict[int, int] = {}
        self.views: set[int] = set()
        self.semaphores: set[int] = set()
        self.bus_errors = 0
        self._daemon_killed = -SECONDS
        self._stack = ExitStack()
        self.daemon = Coherenced(folder)
        self.members = [Member(self, number) for number in range(1, guests + 1)]
        self.models = [Model(folder / "models", self.share, file) for file in FILES if file.exact]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.daemon)
            for model in self.models:
                stack.callback(model.close)
            for file in FILES:
                (self.share / file.name).touch()
            self.start_daemon()
            assert self.daemon.process is not None
            self.fresh = descriptors(self.daemon.process.pid)
            for member in self.members:
                stack.callback(member.backend.kill)
                member.start_backend()
            for member in self.members:
                stack.callback(member.kill_guest)
                member.start_guest()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def backend(self, guest: str) -> Backend:
        """A backend of the domain, which is not started."""
        return Backend(
            self.share,
            self.folder,
            name=guest,
            cache="shared",
            daemon=self.daemon,
            options=("--guest", guest, "--dax", "always", "--dax-window", str(WINDOW)),
        )

    def start_daemon(self) -> None:
        self.daemon.start(*self._limits)

    def kill_daemon(self) -> None:
        """kill -9."""
        self._daemon_killed = time.monotonic()
        self.daemon.kill()

    def use(self) -> DaxReport:
        """What coherenced knows."""
        return fetch_dax(self.daemon.socket, 50)

    def remember(self, backend: int) -> None:
        """Note what a backend that was just started has, and must not leave behind."""
        for pid in (backend, *_children(backend)):
            self.processes[pid] = start_time(pid)
        self.views |= {os.minor(number) for number in devices(backend)} & fuse_mounts()
        self.semaphores |= set(self.daemon.paths.journal_keys())

    def bus_error(self, member: Member) -> None:
        """A guest died of SIGBUS. Failed when nothing explains that.

        It may when its backend was killed, or coherenced, or when it was too slow to revoke what others truncated.
        """
        self.bus_errors += 1
        killed = max(member.backend_killed, self._daemon_killed) > member.mounted
        late = any(LATE in line and f"guest={member.name} " in line for line in self.daemon.log().splitlines())
        if not (killed or late):
            raise Failed(f"guest {member.name} died of SIGBUS, not after a kill: {member.log()[-3000:]}")

    def logs(self) -> str:
        """What coherenced and backends wrote."""
        return self.daemon.log() + "".join(member.backend.log() for member in self.members)


def fuse_mounts() -> set[int]:
    """Minor device numbers of all FUSE mounts of the machine."""
    return {int(path.name) for path in Path("/sys/fs/fuse/connections").glob("*")}


def start_time(pid: int) -> int:
    """Of a process, in clock ticks since the machine was started; -1 when it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if words[0] == "Z" else int(words[19])


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(path.readlink()))
        except FileNotFoundError:
            continue
    return sorted(found)


def devices(pid: int) -> set[int]:
    """Of what a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(path.stat().st_dev)
        except OSError:
            continue
    return found


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
