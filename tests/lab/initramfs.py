"""The initial file system of a guest: busybox, the agent, the kernel modules it needs, and /init."""

from __future__ import annotations

import lzma
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path


def pack(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Write a cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).

    Args:
        files: For each path, without a leading slash: mode with file type, and contents. Folders are added.
    """
    folders = {
        str(parent): (stat.S_IFDIR | 0o755, b"") for path in files for parent in Path(path).parents if parent.name
    }
    entries = sorted({**folders, **files}.items())
    archive = bytearray()
    for number, (path, (mode, data)) in enumerate([*entries, ("TRAILER!!!", (0, b""))], start=1):
        name = path.encode() + b"\0"
        #         inode   mode  uid gid links mtime size      device      special device  name size  checksum
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def program(path: Path) -> tuple[int, bytes]:
    """An executable file of the initramfs."""
    return stat.S_IFREG | 0o755, path.read_bytes()


def text(contents: str) -> tuple[int, bytes]:
    """A plain file of the initramfs."""
    return stat.S_IFREG | 0o644, contents.encode()


def modules(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Kernel modules with all they depend on, decompressed, in the order in which they must be loaded.

    Args:
        folder: A kernel's module folder, with modules.builtin.
        names: Names without suffix; those built into the kernel are left out.
    """
    files = {_name(path.name): path for path in folder.rglob("*.ko*")}
    builtin = {_name(line) for line in (folder / "modules.builtin").read_text().splitlines()}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name in builtin:
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends.group(1).decode().split(",") if depends else ():
            if needed:
                load(_name(needed))
        loaded[name] = data

    for name in names:
        load(_name(name))
    return {f"{name}.ko": data for name, data in loaded.items()}


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")
