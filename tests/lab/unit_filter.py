"""Run a command as a systemd unit runs its service: with its system calls and its capabilities (prefix()).

systemd itself says what its groups of system calls are (systemd-analyze), libseccomp makes the filter, setpriv(1)
takes the capabilities away. As in systemd.exec(5) what the unit does not allow kills the process, and a call that this
systemd does not know is ENOSYS.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def missing() -> str | None:
    """Why units cannot be imitated here; None where they can."""
    if os.geteuid() != 0:
        return "the units' services start as root: run this as root"
    for program, package in (("systemd-analyze", "systemd"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            return f"no {program} here: install {package}"
    return None


def prefix(unit: Path) -> list[str]:
    """What comes before a command that is to run as this unit's service."""
    kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in settings(unit, "CapabilityBoundingSet"))
    privileges = ["setpriv", "--no-new-privs", f"--bounding-set=-all{kept}", "--inh-caps=-all"]
    return [*privileges, sys.executable, "-m", "tests.lab.unit_filter", str(unit)]


def settings(unit: Path, name: str) -> list[str]:
    """All words of a setting of the unit."""
    lines = (line.partition("=") for line in unit.read_text().splitlines())
    return [word for key, _, value in lines if key == name for word in value.split()]


def _calls(word: str) -> Iterator[str]:
    """The names of a group's system calls, or of one."""
    if not word.startswith("@"):
        yield word
        return
    listed = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines()[1:]:
        if (name := line.strip()) and not name.startswith("#"):
            yield from _calls(name)


def _filter(unit: Path) -> None:
    """Take from this process, and what it executes, the system calls that the unit does not allow."""
    # Only here: it wants libseccomp, which comes with systemd.
    import pyseccomp  # type: ignore[import-untyped]

    allowed = {name for word in ("@default", *settings(unit, "SystemCallFilter")) for name in _calls(word)}
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in allowed | set(_calls("@known")):
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        # Other architectures' calls have negative numbers.
        if number >= 0:
            rules.add_rule(pyseccomp.ALLOW if name in allowed else pyseccomp.KILL_PROCESS, number)
    rules.load()


if __name__ == "__main__":
    _filter(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
