"""Which accelerator QEMU uses: KVM only where a probe shows, within a time limit, that it works."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.paths import LAB_DIR, LabError

_KVM = ["-accel", "kvm", "-cpu", "host"]
# A machine that is made and set up like a guest's, but never runs, and ends when its monitor is told so. Making a
# virtual machine is not enough to know: on some hosts QEMU aborts when it then sets the processor's registers.
_PROBE = [
    "qemu-system-x86_64", *_KVM,
    "-nodefaults", "-no-user-config", "-display", "none", "-S", "-monitor", "stdio",
]  # fmt: skip
_stuck: list[subprocess.Popen[bytes]] = []
"""Probes that hang in the kernel: they cannot be waited for, and are kept so that nobody tries."""


def probe(command: Sequence[str] = _PROBE, timeout: float = 5) -> bool:
    """Whether QEMU can make a machine with KVM within the time limit, tried in a child process.

    On some hosts opening /dev/kvm hangs in the kernel: such a child is killed and left to itself.

    Args:
        command: What to run; it gets "quit" as a line and must end with status 0.
        timeout: Seconds.
    """
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.communicate(b"quit\n", timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        _stuck.append(child)
        return False
    return child.returncode == 0


@functools.cache
def choose() -> str:
    """ "kvm" or "tcg": what $LAB_ACCEL says, or for "auto" (the default) what the probe finds.

    The finding is kept until the host boots again, so that a probe that hangs is not repeated.
    """
    wanted = os.environ.get("LAB_ACCEL", "auto")
    if wanted in ("kvm", "tcg"):
        return wanted
    if wanted != "auto":
        raise LabError(f"LAB_ACCEL is {wanted!r}: use auto, kvm or tcg")
    found = LAB_DIR / f"accel-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    if not found.exists():
        LAB_DIR.mkdir(parents=True, exist_ok=True)
        found.write_text("kvm" if probe() else "tcg")
    return found.read_text()


def qemu_options() -> list[str]:
    """QEMU's options for the chosen accelerator."""
    if choose() == "kvm":
        return _KVM
    # An interrupt right after cmpxchg16b finds garbage in EFLAGS under QEMU 7.2: the guest's kernel, which uses it
    # on each allocation where there is one, dies of a double fault once in a while. Fast strings (erms), which the
    # kernel prefers to copy with, are a byte at a time in software.
    return ["-accel", "tcg,tb-size=128", "-cpu", "Haswell-v4,-cx16,-erms"]


def kernel_words() -> str:
    """Words of a guest kernel's command line for the chosen accelerator."""
    # A Haswell needs page tables of its own for the kernel, processors since 2019 do not. In software each change of
    # tables forgets all translations: system calls take five times as long.
    return "" if choose() == "kvm" else "pti=off"
