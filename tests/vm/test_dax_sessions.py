"""A real guest on QEMU 11.1 that maps files, unmounts, starts anew, and whose backend loses its view process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coherent_vfs.server.dax.view import MOST_STARTS
from tests.integration.coherenced_process import eventually
from tests.lab import assets, backends
from tests.lab.backends import Backend
from tests.lab.guest import Guest, boot
from tests.vm.dax_place import dax_place
from tests.vm.test_dax_transport import Monitor

PROGRAM = Path(__file__).with_name("programs") / "mapped"
CHUNK = 2 << 20
TAGS = ("kept", "crashed")


class Machine:
    """A guest with two shares, each with a window of its own.

    Attributes:
        vm: the guest.
        folder: the shared directory.
        backends: by tag.
    """

    def __init__(self, vm: Guest, folder: Path, served: dict[str, Backend], monitor: Monitor) -> None:
        self.vm, self.folder, self.backends, self._monitor = vm, folder, served, monitor

    def mapped(self) -> int:
        """How many pieces of files QEMU has mapped for the guest."""
        regions = self._monitor("info mtree -f").split("FlatView")
        return max(region.count("virtio-shmem-") for region in regions)

    def view_pid(self, tag: str) -> int:
        """The view process of a backend."""
        pid = self.backends[tag].pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def start_anew(self) -> None:
        """Have the guest boot again."""
        self.vm.reboot()
        self.vm.put_file("/mapped", assets.compile_static(PROGRAM).read_bytes())


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with dax_place() as place, ExitStack() as stack:
        share, folder = place.share, place.folder
        (share / "old").write_bytes(content(0))
        daemon = stack.enter_context(backends.daemon(folder, place.table))
        options = place.coherence(daemon)
        options += ["--dax", "always", "--dax-window", "32M", "--lease-max", "10"]
        served = {}
        for tag in TAGS:
            served[tag] = stack.enter_context(backends.ours(share, folder, cache="shared", tag=tag, options=options))
        sockets = {tag: backend.socket for tag, backend in served.items()}
        extra = ["-monitor", f"unix:{folder}/monitor,server,nowait"]
        vm = stack.enter_context(boot("qemu-dax", shares=sockets, extra=extra))
        vm.put_file("/mapped", assets.compile_static(PROGRAM).read_bytes())
        monitor = Monitor(folder / "monitor")
        stack.callback(monitor.close)
        yield Machine(vm, share, served, monitor)


def content(seed: int) -> bytes:
    return bytes((number + seed) % 251 for number in range(4096)) * (3 * CHUNK // 4096)


def look(machine: Machine, name: str) -> None:
    """Read a file in the guest that was just made on the host."""
    data = content(len(name))
    (machine.folder / name).write_bytes(data)
    told = machine.vm.check(f"cat /mnt/{name} > /tmp/{name} && stat -c %s /tmp/{name} && head -c 5000 /tmp/{name}")
    machine.vm.check(f"rm /tmp/{name}")
    assert told == b"%d\n" % len(data) + data[:5000]


def stays_mapped(machine: Machine, name: str) -> bool:
    """Read a file; by a lease it stays known, and mapped, when nobody has it open. That gets longer with its age."""
    machine.vm.check(f"cat /mnt/{name} > /dev/null")
    return machine.mapped() > 0


def test_nothing_is_mapped_when_umount_returns(machine: Machine) -> None:
    """So a machine that starts anew in an orderly manner lives: QEMU 11.1 dies of mappings that are there then."""
    for round_ in range(2):
        machine.vm.mount("kept", "/mnt", "dax=always")
        eventually(lambda: stays_mapped(machine, "old"))
        machine.vm.check("umount /mnt")
        assert machine.mapped() == 0
        if round_ == 0:
            machine.start_anew()
    machine.vm.mount("kept", "/mnt", "dax=always")
    look(machine, "after-that")
    machine.vm.check("umount /mnt")


def test_a_view_process_that_is_killed_is_started_anew(machine: Machine) -> None:
    """What is mapped goes on, and new files are mapped."""
    vm = machine.vm
    vm.mount("kept", "/mnt", "dax=always")
    look(machine, "before")
    words = "tell /tmp/at wait /tmp/go put 5 77 get 4096"
    vm.check(f"(/mapped /mnt/before {CHUNK} get 4096 {words} > /tmp/seen 2>&1; echo $? > /tmp/end) > /dev/null 2>&1 &")
    vm.check("while [ ! -e /tmp/at ]; do sleep 0.01; done")
    pid = machine.view_pid("kept")
    os.kill(pid, signal.SIGKILL)
    vm.check("touch /tmp/go; while [ ! -s /tmp/end ]; do sleep 0.01; done")
    assert vm.check("cat /tmp/end /tmp/seen").split()[0] == b"0"
    assert (machine.folder / "before").read_bytes()[5] == 77
    look(machine, "after")
    assert machine.view_pid("kept") != pid
    vm.check("umount /mnt")


def test_view_processes_that_end_again_and_again(machine: Machine) -> None:
    """Files that the guest meets from then on are read by requests, in a mount that leaves that to the backend."""
    vm = machine.vm
    vm.mount("crashed", "/mnt", "dax=inode")
    for number in range(50):
        look(machine, f"mapped{number}")
        os.kill(machine.view_pid("crashed"), signal.SIGKILL)
        (machine.folder / f"next{number}").write_bytes(content(1))
        if vm.run(f"cat /mnt/next{number} > /dev/null").status != 0:
            # The guest had met it as a file to be mapped. More of them are killed where they take more than a minute.
            assert number >= MOST_STARTS
            break
    look(machine, "by-requests")
    vm.check("umount /mnt")
    assert machine.mapped() == 0
