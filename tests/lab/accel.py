"""Which accelerator QEMU uses: KVM only where a guest comes up with it within a time limit."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.lab import assets
from tests.lab import initramfs as cpio
from tests.lab.paths import LAB_DIR, LabError

KVM_FAILURE = "KVM internal error"
"""What QEMU says when KVM cannot run a guest any further; the guest stays then as it is."""
PROBE_TIMEOUT = 10.0
"""Seconds; with KVM that works the probe takes one."""
_DEVICE = Path("/dev/kvm")
_KVM = ["-accel", "kvm", "-cpu", "host"]
_GREETING = b"lab: user space"
_stuck: list[subprocess.Popen[bytes]] = []
"""Probes that hang in the kernel: they cannot be waited for, and are kept so that nobody tries."""
_probing = threading.Lock()


def probe(command: Sequence[str], timeout: float) -> bool:
    """Whether a guest comes up within the time limit, tried in a child process.

    That a virtual machine can be made does not tell: on some hosts it even runs a boot sector, and then no kernel. On
    others opening /dev/kvm hangs: such a child is killed and left to itself.

    Args:
        command: What starts the guest; its output is the guest's console, and what QEMU has to say.
        timeout: Seconds.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    try:
        return _greets(child.stdout.fileno(), time.monotonic() + timeout)
    finally:
        child.kill()
        try:
            child.wait(1)
        except subprocess.TimeoutExpired:
            _stuck.append(child)
        child.stdout.close()


def _greets(console: int, deadline: float) -> bool:
    """Whether the greeting comes before the output ends, KVM fails or the time is over."""
    seen = b""
    while (left := deadline - time.monotonic()) > 0 and select.select([console], [], [], left)[0]:
        piece = os.read(console, 4096)
        if not piece or KVM_FAILURE.encode() in seen + piece:
            return False
        seen += piece
        if _GREETING in seen:
            return True
    return False


def boots(options: Sequence[str], timeout: float) -> bool:
    """Whether QEMU with these options brings the laboratory's own kernel to its first line of user space."""
    if shutil.which("qemu-system-x86_64") is None:
        raise LabError("QEMU is missing: apt-get install qemu-system-x86")
    init = f"#!/bin/busybox sh\necho {_GREETING.decode()}\nexec /bin/busybox sleep 1000\n"
    with tempfile.NamedTemporaryFile(prefix="lab-probe-") as initrd:
        initrd.write(cpio.pack({"init": (0o100755, init.encode()), "bin/busybox": cpio.program(assets.busybox())}))
        initrd.flush()
        return probe(
            [
                "setpriv", "--pdeathsig", "KILL", "--",
                "qemu-system-x86_64", *options, "-nodefaults", "-no-user-config", "-display", "none",
                "-m", "128M", "-serial", "stdio", "-kernel", str(assets.cloud_kernel().image), "-initrd", initrd.name,
                "-append", "console=ttyS0 loglevel=4 panic=0 tsc=reliable no_timer_check",
            ],
            timeout,
        )  # fmt: skip


def may_choose() -> bool:
    """Whether it is ours to say which accelerator is used: $LAB_ACCEL does not."""
    wanted = os.environ.get("LAB_ACCEL", "auto")
    if wanted not in ("auto", "kvm", "tcg"):
        raise LabError(f"LAB_ACCEL is {wanted!r}: use auto, kvm or tcg")
    return wanted == "auto"


def choose() -> str:
    """ "kvm" or "tcg": what $LAB_ACCEL says, or for "auto" (the default) what the probe finds.

    The finding is kept until the host boots again, so that a probe that hangs is not repeated.
    """
    return _found() if may_choose() else os.environ["LAB_ACCEL"]


def _finding() -> Path:
    return LAB_DIR / f"accelerator-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def _found() -> str:
    with _probing:
        if not _finding().exists():
            works = _DEVICE.exists() and boots(_KVM, PROBE_TIMEOUT)
            if not works:
                print("lab: no guest comes up with KVM here: software emulation (TCG) is used", file=sys.stderr)
            _keep("kvm" if works else "tcg")
        return _finding().read_text()


def give_up_kvm(reason: str) -> None:
    """From now on until the host boots again, choose TCG: a guest came up with it that did not with KVM."""
    print(f"lab: a guest did not come up with KVM ({reason}): software emulation (TCG) is used", file=sys.stderr)
    _keep("tcg")


def _keep(name: str) -> None:
    # Others may look at any time.
    LAB_DIR.mkdir(parents=True, exist_ok=True)
    partial = _finding().with_suffix(f".{os.getpid()}")
    partial.write_text(name)
    partial.rename(_finding())


def qemu_options(name: str) -> list[str]:
    """QEMU's options for an accelerator."""
    if name == "kvm":
        return _KVM
    # An interrupt right after cmpxchg16b finds garbage in EFLAGS under QEMU 7.2: the guest's kernel, which uses it
    # on each allocation where there is one, dies of a double fault once in a while. Fast strings (erms), which the
    # kernel prefers to copy with, are a byte at a time in software.
    return ["-accel", "tcg,tb-size=128", "-cpu", "Haswell-v4,-cx16,-erms"]


def kernel_words(name: str) -> str:
    """Words of a guest kernel's command line for an accelerator."""
    # A Haswell needs page tables of its own for the kernel, processors since 2019 do not. In software each change of
    # tables forgets all translations: system calls take five times as long.
    return "" if name == "kvm" else "pti=off"
