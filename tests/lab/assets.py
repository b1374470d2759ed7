"""What guests are made of: kernels, busybox, the agent. Fetched by tests.lab.setup, found here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import initramfs as cpio
from tests.lab.paths import BUILT, LAB_DIR, TREES, LabError

HERE = Path(__file__).parent
CLOUD_TREE = TREES / "cloud-kernel"
UML_TREE = TREES / "uml"
VIRTIOFSD_C_TREE = TREES / "virtiofsd-c"
QEMU_DAX_TREE = TREES / "qemu-dax"
SQLITE_TREE = TREES / "sqlite"
USERLAND_TREE = TREES / "userland"
USERLAND_IMAGE = LAB_DIR / "userland.ext4"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A guest kernel: its image, its module folder, and the tree that it was unpacked into."""

    image: Path
    modules: Path
    tree: Path


@dataclasses.dataclass(frozen=True)
class Root:
    """The root file system that the initramfs switches to: arguments of mount."""

    source: str
    type: str
    options: str


NO_ROOT = Root("", "", "")


def cloud_kernel() -> Kernel:
    """Debian's cloud kernel, for QEMU."""
    return _kernel(CLOUD_TREE, "boot/vmlinuz-*", "usr/lib/modules/*")


def uml_kernel() -> Kernel:
    """User-Mode Linux."""
    return _kernel(UML_TREE, "usr/bin/linux.uml", "usr/lib/uml/modules/*")


def busybox() -> Path:
    """A static busybox."""
    return _find(CLOUD_TREE, "usr/bin/busybox")


def qemu_dax() -> list[str]:
    """The words that begin a command of the QEMU that has DAX windows."""
    program = _find(QEMU_DAX_TREE, "usr/bin/qemu-system-x86_64")
    firmware = [QEMU_DAX_TREE / "usr/share" / name for name in ("seabios", "qemu")]
    return [*loader(QEMU_DAX_TREE), str(program), *(word for folder in firmware for word in ("-L", str(folder)))]


def loader(tree: Path) -> list[str]:
    """The words before a program of another release that make it use that release's libraries."""
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    interpreter = _find(tree, "lib64/ld-linux-x86-64.so.2")
    return [str(interpreter), "--library-path", f"{libraries}:{tree}/lib/x86_64-linux-gnu"]


def userland_image() -> Path:
    """An ext4 image with a whole Debian userland; guests discard what they change in it."""
    return _find(USERLAND_IMAGE.parent, USERLAND_IMAGE.name)


def agent() -> Path:
    """The agent, compiled when it must be."""
    return compile_static(HERE / "agent/agent.c")


def sqlite() -> list[str]:
    """What compile_static needs for a program that uses SQLite."""
    archive = _find(SQLITE_TREE, "usr/lib/x86_64-linux-gnu/libsqlite3.a")
    return [f"-I{SQLITE_TREE}/usr/include", str(archive), "-lm"]


def compile_static(source: Path, words: Sequence[str] = ()) -> Path:
    """Compile a C program so that it runs in any guest; done once for each content of the source.

    Args:
        source: The program's only file, or a folder of files (*.c and *.h) that are built together.
        words: More words for the compiler, after the sources: libraries and where their headers are.
    """
    files = sorted(source.glob("*.[ch]")) if source.is_dir() else [source]
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
    program = BUILT / f"{source.stem}-{digest}"
    if program.exists():
        return program
    if shutil.which("gcc") is None:
        raise LabError("the C compiler is missing: apt-get install gcc libc6-dev")
    BUILT.mkdir(parents=True, exist_ok=True)
    # Several threads may compile it at once.
    partial = program.with_suffix(f".{secrets.token_hex(4)}")
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    command = ["gcc", *options, "-o", str(partial), *(str(file) for file in files if file.suffix == ".c"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LabError(f"{source} does not compile:\n{result.stderr}")
    partial.rename(program)
    return program


def initramfs(
    kernel: Kernel, modules: Sequence[str], root: Root, port: str, files: Mapping[str, tuple[int, bytes]]
) -> bytes:
    """The initial file system for one boot.

    Args:
        kernel: The kernel that boots.
        modules: Kernel modules to load.
        root: What to switch to; NO_ROOT stays in memory.
        port: Device of the agent's port in the guest.
        files: More files.
    """
    loaded = _modules(kernel.modules, tuple(modules))
    env = (
        f"MODULES='{' '.join(loaded)}'\nPORT={port}\n"
        f"ROOT_SOURCE='{root.source}'\nROOT_TYPE='{root.type}'\nROOT_OPTIONS='{root.options}'\n"
    )
    return cpio.pack(
        {
            "init": cpio.program(HERE / "agent/init"),
            "agent": cpio.program(agent()),
            "bin/busybox": cpio.program(busybox()),
            "bin/sh": cpio.program(busybox()),
            "etc/passwd": cpio.text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"),
            "etc/group": cpio.text("root:x:0:\nuser:x:1000:\n"),
            "lab.env": cpio.text(env),
            **{f"modules/{name}": (0o100644, data) for name, data in loaded.items()},
            **files,
        }
    )


def share_root(folder: Path) -> None:
    """Make a share that a guest can have as its root: busybox, the agent, /lab/init."""
    for name in (
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "proc",
        "sys",
        "dev",
        "tmp",
        "mnt",
        "root",
        "run",
        "etc",
        "lab",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox(), folder / "bin/busybox")
    shutil.copy(agent(), folder / "lab/agent")
    (folder / "lab/init").write_text(
        "#!/bin/busybox sh\n"
        "/bin/busybox --install -s\n"
        "mount -t proc proc /proc\nmount -t sysfs sys /sys\n"
        "[ -c /dev/vport0p1 ] || mount -t devtmpfs dev /dev\n"
        "exec /lab/agent /dev/vport0p1\n"
    )
    (folder / "lab/init").chmod(0o755)
    (folder / "bin/sh").unlink(missing_ok=True)
    (folder / "bin/sh").symlink_to("busybox")


@functools.cache
def _modules(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return cpio.modules(folder, names)


def _kernel(tree: Path, image: str, modules: str) -> Kernel:
    return Kernel(_find(tree, image), _find(tree, modules), tree)


def _find(tree: Path, pattern: str) -> Path:
    found = sorted(tree.glob(pattern)) if tree.is_dir() else []
    if not found:
        raise LabError(f"{pattern} is not in {tree}: run python -m tests.lab.setup --all")
    return found[-1]
