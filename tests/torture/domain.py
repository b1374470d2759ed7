"""The daemon, the backends and the guests of a torture test, each of which can be killed and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.coarse_file_system import coarse_file_system
from tests.lab import assets, backends
from tests.lab.guest import Guest, GuestError, boot
from tests.torture.actions import Action, Result, Watch
from tests.torture.port import Actor, Lost, Port

NOT_SERVED = {errno.EIO, errno.ENOTCONN, errno.ENODEV, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ENXIO, errno.EFAULT}
"""What a guest's kernel says when its backend is gone, EFAULT of a mapped page; or nothing, and waits for ever."""
READY_SECONDS = 20.0
_STATE_SECONDS = 20.0
_STACKS = "for s in /proc/[0-9]*/task/*/stack; do head -n 6 $s | tr '\\n' ' '; echo; done | sort | uniq -c | sort -rn"
MEMORY = {"qemu": 160, "uml": 128}
"""Of a guest, in MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a domain consists of.

    Attributes:
        kind: Of guests: "qemu" or "uml".
        guests: How many, each with a backend.
        contexts: Threads of each guest's actor.
        cache: Cache mode of the backends.
        lease_max, lease_margin: Options of the backends in mode shared, in seconds.
        isolated: Each backend is in a domain of its own, so nobody waits for the leases of another, or is told what
            another changed: a test that finds nothing stale then would never find anything.
        host_fs: What file system the share is on, one of MAKERS; empty: that of the folder for temporary files.
    """

    kind: str = "uml"
    guests: int = 2
    contexts: int = 16
    cache: str = "shared"
    lease_max: float = 1.0
    lease_margin: float = 0.2
    isolated: bool = False
    host_fs: str = ""


class Member:
    """A guest and its backend.

    Attributes:
        alive: Set while the guest can be asked.
        actor: Whom to ask.
        lives: How often it was started.
    """

    def __init__(self, domain: Domain, number: int) -> None:
        self.number = number
        self.alive = asyncio.Event()
        self.actor: Actor
        self.lives = 0
        self._domain = domain
        self._folder = domain.folder / f"g{number}"
        self._folder.mkdir()
        self._backend_life = contextlib.ExitStack()
        self._backend: backends.Backend
        self._port: Port
        self._guest: Guest | None = None

    async def start(self) -> None:
        """Start a backend and boot a guest on it."""
        async with self._domain.daemon_lives:
            await asyncio.to_thread(self._start_backend)
        self._port = Port(self._domain.plan.kind, self._folder)
        guest, fd = await asyncio.to_thread(self._boot, self._port)
        self._guest = guest
        self.actor = Actor(fd)
        try:
            await asyncio.wait_for(self.actor.ready.wait(), READY_SECONDS)
        except TimeoutError:
            raise RuntimeError(f"guest {self.number}: no actor\n{guest.console[-3000:]}") from None
        self.lives += 1
        self.alive.set()

    async def ask(self, context: int, actions: Sequence[Action | Watch]) -> list[Result]:
        """Let a context of the guest do actions, in order.

        Raises:
            Lost: The guest has ended, or its backend before it served all of them.
        """
        results = await self.actor.ask(context, actions)
        if not self.alive.is_set() and any(result.error in NOT_SERVED for result in results):
            raise Lost(f"backend {self.number} was killed")
        return results

    async def kill_backend(self) -> None:
        """kill -9; returns when it has ended. The guest lives on, without an answer to anything it asks."""
        self.alive.clear()
        os.kill(self._backend.pid, signal.SIGKILL)
        await asyncio.to_thread(self._reap_backend)

    async def kill_guest(self) -> None:
        """End the guest like a power failure; what was asked of it is lost."""
        self.alive.clear()
        guest, self._guest = self._guest, None
        if guest is not None:
            self.actor.lose(f"guest {self.number} was killed")
            self._port.close()
            await asyncio.to_thread(guest.kill)

    async def replace(self) -> None:
        """After kill_backend: another guest on another backend at the same socket."""
        await self.kill_guest()
        await self.start()

    async def stop(self) -> None:
        """End both."""
        await self.kill_guest()
        await asyncio.to_thread(self._backend_life.close)

    def check(self) -> None:
        """Raise if the guest or its backend has ended though it should live."""
        if self.alive.is_set() and not Path(f"/proc/{self._backend.pid}").exists():
            raise RuntimeError(f"backend {self.number} has ended: {self._backend.process.output()}")
        guest = self._guest
        if self.alive.is_set() and guest is not None and not Path(f"/proc/{guest.pid}").exists():
            raise RuntimeError(f"guest {self.number} has ended: {guest.console[-3000:]}")

    async def state(self) -> str:
        """What it does, for people: where its threads wait, how many there, and whether one more request helps."""
        told = [f"guest {self.number}: {self.actor}"]
        for command in (_STACKS, "ls /mnt"):
            with contextlib.suppress(GuestError, TimeoutError):
                if self._guest is not None:
                    result = await asyncio.to_thread(self._guest.run, command, timeout=_STATE_SECONDS)
                    told.append(result.output.decode(errors="replace"))
        told.append(f"then: {self.actor}")
        return "\n".join(told)

    def logs(self) -> str:
        """What its backends and its guest wrote."""
        console = self._guest.console[-2000:] if self._guest is not None else ""
        return (self._folder / "share.log").read_text(errors="replace") + console

    def _start_backend(self) -> None:
        domain, plan = self._domain, self._domain.plan
        center = domain.centers[self.number % len(domain.centers)]
        options = ["--coherence", f"/dev/shm{center.table}", "--coherence-socket", str(center.socket)]
        options += ["--guest", f"g{self.number}", "--xattr"]
        if plan.cache == "shared":
            options += ["--lease-max", str(plan.lease_max), "--lease-margin", str(plan.lease_margin)]
        served = backends.ours(domain.share, self._folder, cache=plan.cache, options=options)
        self._backend = self._backend_life.enter_context(served)

    def _boot(self, port: Port) -> tuple[Guest, int]:
        plan = self._domain.plan
        guest = boot(
            plan.kind,
            shares={"share": self._backend.socket},
            memory=MEMORY[plan.kind],
            files={"actor": (0o100755, self._domain.program.read_bytes())},
            **port.machine,
        )
        try:
            guest.mount("share", "/mnt")
            guest.check(f"/actor /mnt {port.device} {plan.contexts} > /dev/console 2>&1 &")
            return guest, port.connect()
        except BaseException:
            guest.kill()
            raise

    def _reap_backend(self) -> None:
        self._backend.process.wait(10)
        self._backend_life.close()


class _Center:
    """A daemon and its version table.

    Attributes:
        table: Its name.
        socket: The daemon's.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.table = f"/torture-{os.getpid()}-{secrets.token_hex(3)}"
        self.socket = folder / "coherenced.sock"
        self._folder = folder
        self._life = contextlib.ExitStack()
        self._daemon: backends.Backend

    def start(self) -> None:
        self._daemon = self._life.enter_context(backends.daemon(self._folder, self.table))

    def kill(self) -> None:
        os.kill(self._daemon.pid, signal.SIGKILL)
        self._daemon.process.wait(10)
        self._life.close()

    def stop(self) -> None:
        self._life.close()
        backends.remove_table(self.table)

    def log(self) -> str:
        return self._daemon.process.output()


class Domain:
    """A daemon and its members; use open_domain.

    Attributes:
        share: The shared directory.
        program: The actor.
        centers: The daemon and its table; when all are to be apart, one for each member.
        daemon_lives: Held while the daemon is replaced, and by whoever needs that it is not: a backend's start.
    """

    def __init__(self, plan: Plan, folder: Path, share: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.share = share
        self.program = assets.compile_static(Path(__file__).with_name("actor"))
        self.centers = [_Center(folder / f"d{number}") for number in range(plan.guests if plan.isolated else 1)]
        self.daemon_lives = asyncio.Lock()
        self.members = [Member(self, number) for number in range(plan.guests)]

    async def start(self) -> None:
        """Start everything; the guests boot at the same time."""
        for center in self.centers:
            await asyncio.to_thread(center.start)
        await asyncio.gather(*(member.start() for member in self.members))

    async def stop(self) -> None:
        """End everything and remove the table."""
        await asyncio.gather(*(member.stop() for member in self.members))
        for center in self.centers:
            await asyncio.to_thread(center.stop)

    async def kill_daemon(self, away: float) -> None:
        """kill -9, and start another after some seconds."""
        async with self.daemon_lives:
            await asyncio.to_thread(self.centers[0].kill)
            await asyncio.sleep(away)
            await asyncio.to_thread(self.centers[0].start)

    async def counters(self) -> dict[str, dict[str, int]]:
        """Each backend's counters, by guest."""
        found = await asyncio.gather(*(asyncio.to_thread(backends.counters, center.socket) for center in self.centers))
        return {guest: counters for one in found for guest, counters in one.items()}

    async def state(self) -> str:
        """What all do now."""
        states = [await member.state() for member in self.members]
        return "\n".join([*states, str(await self.counters())])

    def logs(self) -> str:
        """What the daemon, the backends and the guests wrote."""
        return "".join([*(center.log() for center in self.centers), *(member.logs() for member in self.members)])


@contextlib.asynccontextmanager
async def open_domain(plan: Plan) -> AsyncIterator[Domain]:
    """A running domain in a folder of its own, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        if plan.host_fs:
            share = stack.enter_context(coarse_file_system(plan.host_fs, folder))
        else:
            share = folder / "share"
            share.mkdir()
        domain = Domain(plan, folder, share)
        try:
            await domain.start()
            yield domain
        finally:
            await domain.stop()
