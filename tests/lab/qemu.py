"""Guests under QEMU with Debian's cloud kernel."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.lab import accel, assets
from tests.lab.machine import Machine
from tests.lab.paths import LabError
from tests.lab.process import Process

PORT = "/dev/vport0p1"


def start(machine: Machine, folder: Path, console: Path, port: socket.socket) -> Process:
    """Start this machine's QEMU. The guest's console goes to a file, the agent's port to the socket.

    Args:
        machine: The guest.
        folder: For files that must live as long as the guest.
        console: File that receives the console.
        port: The guest's end of the agent's socket.
    """
    if shutil.which("qemu-system-x86_64") is None:
        raise LabError("QEMU is missing: apt-get install qemu-system-x86")
    device = "vhost-user-fs-pci,chardev={chardev},tag={tag},queue-size=1024"
    return _start(["qemu-system-x86_64"], device, machine, folder, console, port)


def start_dax(machine: Machine, folder: Path, console: Path, port: socket.socket) -> Process:
    """Start a QEMU whose guests have DAX windows; arguments as those of start. Backends must tell their tags.

    Its virtio-fs device has no window. A device that leaves everything to the backend has: the configuration, too.
    """
    device = "vhost-user-test-device-pci,chardev={chardev},virtio-id=26,num_vqs=2,vq_size=128,config_size=44"
    return _start(assets.qemu_dax(), device, machine, folder, console, port)


def _start(
    program: Sequence[str], device: str, machine: Machine, folder: Path, console: Path, port: socket.socket
) -> Process:
    kernel = assets.cloud_kernel()
    name = machine.accel or accel.choose()
    command = [
        *program, "-nodefaults", "-no-user-config", "-display", "none",
        *accel.qemu_options(name),
        "-m", f"{machine.memory}M", "-smp", str(machine.cpus),
        "-object", f"memory-backend-memfd,id=memory,size={machine.memory}M,share=on",
        "-numa", "node,memdev=memory",
        "-serial", f"file:{console}",
        "-chardev", f"socket,id=agent,fd={port.fileno()}",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent",
        "-kernel", str(kernel.image),
    ]  # fmt: skip
    for number, (tag, path) in enumerate(machine.shares.items()):
        command += ["-chardev", f"socket,id=share{number},path={path}"]
        command += ["-device", device.format(chardev=f"share{number}", tag=tag)]
    # tsc=reliable, no_timer_check: spare the guest the calibration that a loaded host makes it fail.
    words = f"console=ttyS0 loglevel=4 panic=0 tsc=reliable no_timer_check {accel.kernel_words(name)} {machine.append}"
    source, _, place = (machine.root or "").partition(":")
    modules = list(machine.modules)
    if source == "virtiofs":
        # The kernel mounts the root itself: fuse and virtiofs are built into the cloud kernel.
        words += f" root={place} rootfstype=virtiofs rw init=/lab/init"
    else:
        root = assets.NO_ROOT
        if source == "image":
            command += ["-drive", f"file={place},format=raw,if=none,id=root,snapshot=on"]
            command += ["-device", "virtio-blk-pci,drive=root"]
            modules.insert(0, "virtio_blk")
            root = assets.Root("/dev/vda", "ext4", "rw")
        elif source:
            raise LabError(f"QEMU guests have no root {machine.root!r}: use image:PATH or virtiofs:TAG")
        initrd = folder / "initrd"
        initrd.write_bytes(assets.initramfs(kernel, modules, root, PORT, machine.files))
        command += ["-initrd", str(initrd)]
    command += ["-append", words, *machine.extra]
    return Process([*machine.pinned(), *command], log=folder / "qemu.log", pass_fds=[port.fileno()])
