"""Fetch what the laboratory needs: python -m tests.lab.setup [--all].

May be run at any time and again: what is there is left alone, what was cut off goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import apt, assets
from tests.lab.apt import Suite, unpack
from tests.lab.paths import LAB_DIR, LabError

SUITE = "trixie"
"""The release of the kernels (6.12) and of the Rust virtiofsd (1.13)."""
DAX_SUITE = "trixie-backports"
"""The first release with a QEMU that has DAX windows (11.1)."""
OLD_SUITE = "bookworm"
"""The last release with the C virtiofsd (QEMU 7.2)."""
USERLAND = [
    "base-files",
    "bash",
    "coreutils",
    "diffutils",
    "findutils",
    "git",
    "grep",
    "mount",
    "sed",
    "tar",
    "util-linux",
]
IMAGE_SIZE = "1G"
KERNEL = "linux-image-cloud-amd64"


def say(line: str) -> None:
    print(f"lab: {line}", flush=True)


def light() -> None:
    """What QEMU guests need: QEMU itself from this machine's release, the kernel, busybox."""
    _need({"qemu-system-x86_64": ["qemu-system-x86"], "gcc": ["gcc", "libc6-dev"]})

    def debs() -> list[Path]:
        suite = Suite(SUITE, say)
        return suite.download([suite.dependency(KERNEL, "linux-image-"), "busybox-static"])

    unpack(assets.CLOUD_TREE.name, f"{SUITE} {KERNEL} busybox-static", debs, lambda tree: None, say)
    assets.agent()


def peers() -> None:
    """User-Mode Linux, the Rust and the C virtiofsd, a QEMU with DAX windows, SQLite."""
    _programs(assets.UML_TREE, SUITE, ["user-mode-linux", "virtiofsd"])
    _programs(assets.VIRTIOFSD_C_TREE, OLD_SUITE, ["qemu-system-common"])
    _programs(assets.QEMU_DAX_TREE, DAX_SUITE, ["qemu-system-x86"])
    sqlite = ["libsqlite3-dev"]
    # Of the old release: its static library goes with the C library of this machine, whichever that is.
    unpack(
        assets.SQLITE_TREE.name,
        f"{OLD_SUITE} {sqlite}",
        lambda: Suite(OLD_SUITE, say).download(sqlite),
        lambda tree: None,
        say,
    )


def _programs(tree: Path, suite: str, packages: Sequence[str]) -> None:
    """Packages of a release with all that they need, to run from their tree."""
    unpack(
        tree.name,
        f"{suite} {packages}",
        lambda: Suite(suite, say).download_with_dependencies(packages),
        _make_chroot,
        say,
    )


def userland() -> None:
    """A whole Debian userland, unpacked but not configured, and an ext4 image of it."""
    _need({"mke2fs": ["e2fsprogs"]})

    def debs() -> list[Path]:
        return Suite(SUITE, say).download_with_dependencies(USERLAND)

    tree = unpack(assets.USERLAND_TREE.name, f"{SUITE} {USERLAND}", debs, _make_userland, say)
    if not assets.USERLAND_IMAGE.exists() or assets.USERLAND_IMAGE.stat().st_mtime < tree.stat().st_ctime:
        say(f"making {assets.USERLAND_IMAGE}")
        partial = assets.USERLAND_IMAGE.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), "-E", "root_owner=0:0", str(partial), IMAGE_SIZE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise LabError(f"mke2fs cannot make an image of {tree}: {result.stderr.strip()[-300:]}")
        partial.rename(assets.USERLAND_IMAGE)


def _make_userland(tree: Path) -> None:
    _make_chroot(tree)
    for folder in ("newroot", "sys", "run", "mnt", "root", "etc"):
        (tree / folder).mkdir(exist_ok=True)
    (tree / "usr/bin/sh").unlink(missing_ok=True)
    (tree / "usr/bin/sh").symlink_to("bash")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")


def _make_chroot(tree: Path) -> None:
    for folder in ("host", "dev", "proc", "tmp"):
        (tree / folder).mkdir(exist_ok=True)
    for name in ("lib", "lib64", "bin", "sbin"):
        if not (tree / name).exists():
            (tree / name).symlink_to(f"usr/{name}")


def _need(programs: Mapping[str, Sequence[str]]) -> None:
    """Install the packages of programs that are missing on this machine."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    packages = [
        name for program, names in programs.items() if shutil.which(program, path=path) is None for name in names
    ]
    if not packages:
        return
    say(f"installing {' '.join(packages)}")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    for command in (["update", "-q"], ["install", "-q", "--yes", "--no-install-recommends", *packages]):
        words = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *command]
        try:
            result = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise LabError(f"not permitted to install {' '.join(packages)}: run this as root") from None
        if result.returncode != 0:
            raise LabError(f"apt-get cannot install {' '.join(packages)}: {result.stderr.strip()[-300:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.setup", description=__doc__)
    parser.add_argument(
        "--all",
        action="store_true",
        help="also User-Mode Linux, a QEMU with DAX windows, the peers to compare with, and a full userland",
    )
    options = parser.parse_args(arguments)
    LAB_DIR.mkdir(parents=True, exist_ok=True)
    try:
        if not apt.is_debian():
            raise LabError("guests need Debian packages: run this on an x86-64 Debian machine")
        with (LAB_DIR / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            light()
            if options.all:
                peers()
                userland()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    say(f"ready in {LAB_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
