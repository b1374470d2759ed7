"""Guests under User-Mode Linux: Debian trixie's kernel as a program, in a chroot of its own libraries."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

from tests.lab import assets
from tests.lab.machine import Machine
from tests.lab.paths import LabError
from tests.lab.process import Process

PORT = "/dev/ttyS0"
VIRTIO_FS = 26
"""Device number of virtio-fs (virtio specification 1.2, section 5.11)."""

# A private mount namespace: nothing of this is seen outside, or left over.
_ENTER = """
mount --rbind / {tree}/host
mount --rbind /dev {tree}/dev
mount -t proc proc {tree}/proc
# Without address randomization its memory lies in one piece.
exec setarch -R chroot {tree} "$@"
"""


def start(machine: Machine, folder: Path, console: Path, port: socket.socket) -> Process:
    """Start User-Mode Linux; arguments as those of qemu.start."""
    if machine.cpus != 1 or machine.extra:
        raise LabError("User-Mode Linux has one processor and no QEMU devices")
    kernel = assets.uml_kernel()
    root = assets.NO_ROOT
    source, _, place = (machine.root or "").partition(":")
    words: list[str] = []
    if source == "host":
        root = assets.Root("host", "hostfs", "ro,/host")
    elif source == "image":
        overlay = folder / "root.cow"
        words.append(f"ubd0=/host{overlay},/host{place}")
        root = assets.Root("/dev/ubda", "ext4", "rw")
    elif source == "virtiofs":
        root = assets.Root(place, "virtiofs", "rw")
    initrd = folder / "initrd"
    modules = ["virtiofs", *machine.modules]
    initrd.write_bytes(assets.initramfs(kernel, modules, root, PORT, machine.files))
    words += [f"virtio_uml.device=/host{path}:{VIRTIO_FS}" for path in machine.shares.values()]
    command = [
        "/usr/bin/linux.uml", f"mem={machine.memory}M", f"initrd=/host{initrd}", "root=/dev/ram0",
        f"uml_dir=/host{folder}/", "con=null", "con0=null,fd:1", "ssl=null", f"ssl0=fd:{port.fileno()}",
        "loglevel=4", *words, *machine.append.split(),
    ]  # fmt: skip
    enter = _ENTER.format(tree=shlex.quote(str(kernel.tree)))
    return Process(
        [*machine.pinned(), "unshare", "--mount", "sh", "-ec", enter, "sh", *command],
        log=console,
        pass_fds=[port.fileno()],
        env={"TMPDIR": "/dev/shm"},
    )
