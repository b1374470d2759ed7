"""Whoever looks at the shared directory, or changes it: a virtual machine, an embedded guest, the host."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from coherent_vfs.guest.guest import Guest as UserSpaceGuest
from tests.lab.guest import Guest as VirtualMachine


class Viewer(Protocol):
    """Names are relative to the share."""

    name: str

    def write(self, file: str, text: str) -> None:
        """Write a file in place, or make it; acknowledged when this returns."""

    def remove(self, file: str) -> None:
        """Remove a file; acknowledged when this returns."""

    def read(self, file: str) -> str | None:
        """What the file holds, as this viewer sees it; None when it sees no such file."""

    def look(self, file: str, times: int) -> None:
        """Ask for the file's attributes so many times."""


class Host:
    """The host itself, on the directory itself."""

    name = "the host"

    def __init__(self, share: Path) -> None:
        self._share = share

    def write(self, file: str, text: str) -> None:
        (self._share / file).write_text(text)

    def remove(self, file: str) -> None:
        (self._share / file).unlink()

    def read(self, file: str) -> str | None:
        path = self._share / file
        return path.read_text() if path.exists() else None

    def look(self, file: str, times: int) -> None:
        for _ in range(times):
            (self._share / file).stat()


class Stock:
    """A virtual machine with an unmodified kernel."""

    def __init__(self, name: str, machine: VirtualMachine, mount: str) -> None:
        self.name = name
        self._machine = machine
        self._mount = mount

    def write(self, file: str, text: str) -> None:
        self._machine.check(f"printf %s '{text}' > {self._mount}/{file}")

    def remove(self, file: str) -> None:
        self._machine.check(f"rm {self._mount}/{file}")

    def read(self, file: str) -> str | None:
        result = self._machine.run(f"cat {self._mount}/{file} 2>/dev/null")
        return result.output.decode() if result.status == 0 else None

    def look(self, file: str, times: int) -> None:
        # One process: starting others would look at other files as well.
        self._machine.check(f"cd {self._mount}; i=0; while [ $i -lt {times} ]; do [ -e {file} ]; i=$((i+1)); done")


class Embedded:
    """The user-space guest driver; with a table, it checks it."""

    def __init__(self, name: str, guest: UserSpaceGuest) -> None:
        self.name = name
        self._guest = guest

    def write(self, file: str, text: str) -> None:
        self._guest.write_bytes(file, text.encode())

    def remove(self, file: str) -> None:
        self._guest.unlink(file)

    def read(self, file: str) -> str | None:
        try:
            return self._guest.read_bytes(file).decode()
        except FileNotFoundError:
            return None

    def look(self, file: str, times: int) -> None:
        for _ in range(times):
            self._guest.stat(file)
