"""Boot a real guest and run commands in it.

with boot("qemu", shares={"myfs": socket_path}) as vm:
    vm.mount("myfs", "/mnt")
    assert vm.check("cat /mnt/hello") == b"hello"
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import accel, qemu, uml
from tests.lab.channel import Channel, Kind
from tests.lab.machine import Machine
from tests.lab.paths import LabError

KINDS = {"qemu": qemu.start, "qemu-dax": qemu.start_dax, "uml": uml.start}
BOOT_TIMEOUT = 90.0
"""Seconds; a boot takes 1 to 3, but several guests may boot at once on a loaded machine without KVM."""
KVM_BOOT_TIMEOUT = 30.0
"""Seconds that a guest has to come up with KVM before it is tried without."""
KILL_GRACE = 60.0
"""Seconds that a guest has to end a command that was killed for its time limit."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended: exit status (negative: a signal), and standard output and error as one."""

    status: int
    output: bytes


class GuestError(LabError):
    """A guest did not do what was expected of it; the message ends with its console where that may help."""


class Guest:
    """A running guest. Use boot() to make one.

    Attributes:
        pid: Process id of QEMU or User-Mode Linux.
    """

    def __init__(self, kind: str, machine: Machine, timeout: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=f"lab-{kind}-")
        self._console = Path(self._folder.name, "console.log")
        self._console.touch()
        host_end, guest_end = socket.socketpair()
        self._channel = Channel(host_end, self._watch)
        try:
            with guest_end:
                self._process = KINDS[kind](machine, Path(self._folder.name), self._console, guest_end)
        except BaseException:
            host_end.close()
            self._folder.cleanup()
            raise
        self.pid = self._process.pid
        try:
            self._wait_ready(timeout)
        except BaseException:
            self.kill()
            raise

    @property
    def console(self) -> str:
        """What the guest wrote to its console so far."""
        return self._console.read_text(errors="replace")

    def run(self, command: str, *, timeout: float = 60, stdin: bytes = b"") -> Result:
        """Run a shell command in the guest.

        Args:
            command: For /bin/sh -c in the guest.
            timeout: Seconds; a command that takes longer is killed.
            stdin: The command's standard input.

        Raises:
            TimeoutError: The time limit was reached; the guest can be used again.
            GuestError: The guest is dead, or a killed command does not end.
        """
        deadline = time.monotonic() + timeout
        try:
            self._start(command, stdin, deadline)
        except TimeoutError:
            raise GuestError(self._account("the guest takes no commands")) from None
        output = bytearray()
        try:
            status = self._collect(output, deadline)
        except TimeoutError:
            self._stop_command()
            raise TimeoutError(f"{command!r} took more than {timeout} s; it wrote {bytes(output[-2000:])!r}") from None
        return Result(os.waitstatus_to_exitcode(status), bytes(output))

    def check(self, command: str, *, timeout: float = 60, stdin: bytes = b"") -> bytes:
        """Run a command that must succeed and return its output; GuestError with the output otherwise."""
        result = self.run(command, timeout=timeout, stdin=stdin)
        if result.status != 0:
            shown = result.output[-4000:].decode(errors="replace")
            raise GuestError(f"{command!r} ended with status {result.status} and wrote:\n{shown}")
        return result.output

    def mount(self, tag: str, place: str, options: str = "") -> None:
        """Mount a share."""
        words = f"-o {shlex.quote(options)}" if options else ""
        target = shlex.quote(place)
        self.check(f"mkdir -p {target} && mount -t virtiofs {words} {shlex.quote(tag)} {target}")

    def put_file(self, path: str, data: bytes, mode: int = 0o755) -> None:
        """Write a file in the guest, as a program for it to run."""
        place = shlex.quote(path)
        self.check(f"cat > {place} && chmod {mode:o} {place}", stdin=data, timeout=60)

    def reboot(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Restart the guest at once, without unmounting, and wait until it takes commands again."""
        self._start("exec reboot -f", b"", time.monotonic() + timeout)
        self._wait_ready(timeout)

    def kill(self) -> None:
        """End the guest like a power failure; harmless when it has ended."""
        self._process.kill()
        self._channel.close()
        self._folder.cleanup()

    def pause(self) -> None:
        """Stop the guest's processors, as a hung or hostile guest."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused guest go on."""
        os.kill(self.pid, signal.SIGCONT)

    def _start(self, command: str, stdin: bytes, deadline: float) -> None:
        with self._alive():
            self._channel.send_pieces(Kind.INPUT, stdin, deadline)
            self._channel.send_pieces(Kind.SCRIPT, command.encode(), deadline)
            self._channel.send(Kind.RUN, b"", deadline)

    def _collect(self, output: bytearray, deadline: float) -> int:
        while True:
            with self._alive():
                kind, payload = self._channel.receive(deadline)
            if kind is Kind.EXIT:
                return int.from_bytes(payload, "little")
            if kind is not Kind.OUTPUT:
                raise GuestError(self._account("the guest restarted during a command"))
            output += payload

    def _stop_command(self) -> None:
        deadline = time.monotonic() + KILL_GRACE
        try:
            self._channel.send(Kind.KILL, b"", deadline)
            self._collect(bytearray(), deadline)
        except TimeoutError:
            raise GuestError(self._account("a command cannot be killed in the guest")) from None

    def _wait_ready(self, timeout: float) -> None:
        try:
            with self._alive():
                self._channel.wait_hello(time.monotonic() + timeout)
        except TimeoutError:
            raise GuestError(self._account(f"the guest was not ready after {timeout} s")) from None

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            raise GuestError(self._account(f"the guest has ended ({error})")) from None

    def _watch(self) -> None:
        if not self._process.running:
            raise GuestError(self._account("the guest has ended"))
        if self._process.log != self._console and accel.KVM_FAILURE in self._process.output():
            raise GuestError(self._account("QEMU cannot run the guest by KVM"))
        if "Kernel panic" in self.console:
            raise GuestError(self._account("the guest's kernel panicked"))

    def _account(self, what: str) -> str:
        log = self._process.log
        words = "" if log == self._console else log.read_text(errors="replace")
        return f"{what}\n{words}--- end of its console ---\n{self.console[-6000:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def boot(kind: str = "qemu", *, timeout: float = BOOT_TIMEOUT, **machine: Any) -> Guest:
    """Boot a guest and wait until it takes commands; use it in a with statement, which ends it.

    A guest that does not come up with KVM is tried without, where the choice is ours; if that helps, no other guest
    gets KVM.

    Args:
        kind: "qemu", "qemu-dax" (with DAX windows), or "uml".
        timeout: Seconds for the boot.
        machine: Attributes of tests.lab.machine.Machine, as shares, memory, root.

    Raises:
        GuestError: The guest panicked or never took commands; with its console.
        LabError: Something that it needs is missing; the message says how to get it.
    """
    wanted = Machine(**machine)
    if kind == "uml" or wanted.accel or not accel.may_choose() or accel.choose() == "tcg":
        return Guest(kind, wanted, timeout)
    try:
        return Guest(kind, wanted, min(timeout, KVM_BOOT_TIMEOUT))
    except GuestError as error:
        guest = Guest(kind, dataclasses.replace(wanted, accel="tcg"), timeout)
        accel.give_up_kvm(str(error).splitlines()[0])
        return guest
