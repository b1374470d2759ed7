"""The files in examples/ do what they say."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from coherent_vfs.coherence.shm.paths import SHARED_MEMORY
from coherent_vfs.coherence.shm.table import Table
from tests.integration.coherenced_process import SECONDS, Coherenced, eventually
from tests.lab import accel, assets
from tests.lab.paths import LabError

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_read_table_agrees_with_us(tmp_path: Path) -> None:
    program = tmp_path / "read-table"
    subprocess.run(
        ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-o", program, EXAMPLES / "read-table.c"], check=True
    )

    def read(path: Path) -> str:
        return subprocess.run([program, path], check=True, capture_output=True, text=True).stdout

    with Coherenced(tmp_path) as daemon:
        daemon.start()
        table = Table.open(daemon.paths.table, writable=True)
        old = f"slots {table.slot_count}, sequence {table.sequence}, floor {table.floor} (trusted)"
        assert read(daemon.paths.table) == f"{old}, slots that ever changed 0\n"
        table.bump(5)
        table.bump(7)
        assert "slots that ever changed 2" in read(daemon.paths.table)
        table.distrust()
        assert "(trust nothing)" in read(daemon.paths.table)
    refused = subprocess.run([program, program], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no version table of ABI" in refused.stderr


def test_libvirt_xml() -> None:
    file = EXAMPLES / "libvirt.xml"
    domain = ElementTree.parse(file).getroot()
    access, source = domain.find("memoryBacking/access"), domain.find("devices/filesystem/source")
    assert access is not None
    assert access.get("mode") == "shared"
    assert source is not None
    assert source.get("socket") == "/run/vfs-backend/guest1.sock"
    if shutil.which("virt-xml-validate"):
        subprocess.run(["virt-xml-validate", file, "domain"], check=True)


class Console:
    """A guest's shell, on a Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.settimeout(SECONDS)

    def expect(self, prompt: str = "~ # ") -> str:
        """What the guest writes up to its next prompt."""
        seen = b""
        while prompt.encode() not in seen:
            seen += self._socket.recv(4096)
        return seen.decode()

    def run(self, command: str) -> str:
        """What a command says."""
        self._socket.sendall(f"{command}\n".encode())
        return self.expect()

    def close(self) -> None:
        self._socket.close()


@contextmanager
def two_guests(share: Path) -> Iterator[tuple[Path, tuple[Console, Console]]]:
    """examples/two-guests.sh: its folder, and the guests' consoles."""
    environment = os.environ | {
        "KERNEL": str(assets.cloud_kernel().image),
        "BUSYBOX": str(assets.busybox()),
        "ACCEL": accel.choose(),
    }
    script = subprocess.Popen(
        [EXAMPLES / "two-guests.sh", share],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert script.stdout is not None
    consoles: list[Console] = []
    try:
        found = re.search(r"unix-connect:(\S+)/guest1.console", script.stdout.readline())
        assert found is not None
        folder = Path(found[1])
        for guest in ("guest1", "guest2"):
            console = folder / f"{guest}.console"
            eventually(console.exists)
            consoles.append(Console(console))
        for each in consoles:
            assert "the share is at /mnt" in each.expect()
        yield folder, (consoles[0], consoles[1])
    finally:
        for each in consoles:
            each.close()
        script.terminate()
        assert script.wait(SECONDS) == 0
        script.stdout.close()


@pytest.mark.slow
def test_two_guests(tmp_path: Path) -> None:
    try:
        _ = assets.cloud_kernel(), assets.busybox()
    except LabError as error:
        pytest.skip(str(error))
    before = set(SHARED_MEMORY.iterdir())
    (tmp_path / "greeting").write_text("hello\n")
    with two_guests(tmp_path) as (folder, (first, second)):
        assert "hello" in first.run("cat /mnt/greeting")
        assert "hello" in second.run("cat /mnt/greeting")
        first.run("echo 'guest 1 was here' > /mnt/greeting")
        assert "guest 1 was here" in second.run("cat /mnt/greeting")
    assert not folder.exists()
    assert not [path for path in set(SHARED_MEMORY.iterdir()) - before if "two-guests" in path.name]
