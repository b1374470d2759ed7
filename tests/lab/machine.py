"""What a guest consists of, whatever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A guest to be started.

    Attributes:
        shares: Socket of the backend for each tag.
        memory: Memory in MiB.
        cpus: Virtual processors (User-Mode Linux has one).
        root: None: busybox in memory. "image:PATH": an ext4 image, writable, discarded changes.
            "virtiofs:TAG": a share. "host": the host's own files, read-only (User-Mode Linux only).
        files: More files of the initramfs: for each path without leading slash, mode and contents.
        modules: More kernel modules to load at boot, by name.
        append: More words of the kernel's command line.
        extra: More arguments of QEMU, as devices.
        cpu_list: Processors of the host to run on, as "1" or "0-1"; empty: any.
        accel: QEMU's accelerator, "kvm" or "tcg"; empty: what tests.lab.accel chooses.
    """

    shares: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    memory: int = 256
    cpus: int = 1
    root: str | None = None
    files: Mapping[str, tuple[int, bytes]] = dataclasses.field(default_factory=dict)
    modules: Sequence[str] = ()
    append: str = ""
    extra: Sequence[str] = ()
    cpu_list: str = ""
    accel: str = ""

    def pinned(self) -> list[str]:
        """The words before a command that pin it to cpu_list."""
        return ["taskset", "--cpu-list", self.cpu_list] if self.cpu_list else []
