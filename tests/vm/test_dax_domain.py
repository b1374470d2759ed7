"""A guest that maps files and one that does not, in one domain; coherenced and backends that are killed meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import assets, backends
from tests.lab.guest import Guest, boot
from tests.vm.dax_place import DaxPlace, dax_place
from tests.vm.test_dax import CHUNK, PROGRAM, Mapped, content, digest, eventually, sum_of


@dataclass
class Domain:
    """A daemon that can be killed, and two guests, with the same directory at /mnt.

    Attributes:
        place: of them all.
        mapping, backend: a guest that maps files, and its backend.
        stock: a guest that does not.
    """

    place: DaxPlace
    mapping: Guest
    backend: backends.Backend
    stock: Guest
    daemon_life: ExitStack
    daemon: backends.Backend

    @property
    def share(self) -> Path:
        """The directory on the host."""
        return self.place.share

    def kill_daemon(self) -> None:
        """kill -9."""
        os.kill(self.daemon.pid, signal.SIGKILL)
        self.daemon.process.wait(10)
        self.daemon_life.close()

    def start_daemon(self) -> None:
        self.daemon = self.daemon_life.enter_context(backends.daemon(self.place.folder, self.place.table))


@pytest.fixture(scope="module")
def domain() -> Iterator[Domain]:
    with dax_place() as place, ExitStack() as stack:
        daemon_life = stack.enter_context(ExitStack())
        daemon = daemon_life.enter_context(backends.daemon(place.folder, place.table))
        guests: list[Guest] = []
        served: list[backends.Backend] = []
        for name, options in (("mapping", ["--dax", "always", "--dax-window", "16M"]), ("stock", [])):
            run_dir = place.folder / name
            run_dir.mkdir()
            told = [*place.coherence(daemon), "--guest", name, *options]
            backend = stack.enter_context(backends.ours(place.share, run_dir, cache="shared", options=told))
            served.append(backend)
            vm = stack.enter_context(boot("qemu-dax", shares={"share": backend.socket}))
            vm.mount("share", "/mnt", "dax=always" if options else "")
            vm.put_file("/mapped", assets.compile_static(PROGRAM).read_bytes())
            guests.append(vm)
        yield Domain(place, guests[0], served[0], guests[1], daemon_life, daemon)


def test_what_one_stores_the_other_reads_and_the_reverse(domain: Domain) -> None:
    path = domain.share / "both"
    path.write_bytes(content(CHUNK + 100))
    for number in range(10):
        # It reads all of it each time, and keeps nothing that is not so any more.
        assert sum_of(domain.stock, "both") == digest(path.read_bytes())
        domain.mapping.check(f"/mapped /mnt/both {CHUNK + 100} put 5 {number} put {CHUNK + 99} {number + 100}")
        assert domain.stock.check("head -c 6 /mnt/both | tail -c 1") == bytes([number])
        assert domain.stock.check("tail -c 1 /mnt/both") == bytes([number + 100])
        domain.stock.check(f"printf '{number:05}' | dd of=/mnt/both bs=1 seek=50 conv=notrunc 2>/dev/null")
        got = domain.mapping.check(f"/mapped /mnt/both {CHUNK} " + " ".join(f"get {50 + place}" for place in range(5)))
        assert bytes(map(int, got.split())) == f"{number:05}".encode()


def test_sizes_of_each_are_seen_by_the_other(domain: Domain) -> None:
    path = domain.share / "sizes"
    path.write_bytes(b"")
    for number, vm in enumerate([domain.mapping, domain.stock] * 4):
        vm.check(f"printf '{number:0999}\\n' >> /mnt/sizes")
        for other in (domain.mapping, domain.stock):
            assert other.check("stat -c %s /mnt/sizes") == b"%d\n" % (1000 * (number + 1))
            assert sum_of(other, "sizes") == digest(path.read_bytes())


def test_the_guest_without_windows_cuts_a_mapped_file_off(domain: Domain) -> None:
    path, data = domain.share / "cut", content(2 * CHUNK)
    path.write_bytes(data)
    mapped = Mapped(
        domain.mapping, "cut", 2 * CHUNK, f"get 10 get {CHUNK + 10}", "get 10 put 11 99", f"get {CHUNK + 10}"
    )
    mapped.go()
    domain.stock.check("truncate -s 100 /mnt/cut")
    assert domain.mapping.check("stat -c %s /mnt/cut") == b"100\n"
    mapped.go()
    assert domain.stock.check("head -c 12 /mnt/cut | tail -c 1") == bytes([99])
    domain.stock.check("cat >> /mnt/cut", stdin=data[100:])
    assert domain.mapping.check("stat -c %s /mnt/cut") == b"%d\n" % len(data)
    mapped.go(last=True)
    assert mapped.seen() == [data[10], data[CHUNK + 10], data[10], data[CHUNK + 10]]
    expected = data[:11] + bytes([99]) + data[12:]
    assert sum_of(domain.mapping, "cut") == sum_of(domain.stock, "cut") == digest(expected)


def test_permission_bits_are_no_obstacle_to_reading(domain: Domain) -> None:
    """Whom the guest lets read a file, that may write nothing, gets it from the window."""
    path = domain.share / "readable"
    path.write_bytes(content(5000))
    path.chmod(0o444)
    assert sum_of(domain.mapping, "readable") == digest(content(5000))
    path.chmod(0o400)
    assert sum_of(domain.mapping, "readable") == digest(content(5000))


def test_coherenced_is_killed_while_files_are_mapped(domain: Domain) -> None:
    """What is mapped stays usable; what is not, or not to be stored into, waits for the next coherenced."""
    vm, path, new = domain.mapping, domain.share / "stays", domain.share / "new"
    path.write_bytes(content(CHUNK))
    new.write_bytes(content(CHUNK, 9))
    mapped = Mapped(vm, "stays", CHUNK, "get 5 put 4 44", "put 6 66 get 6", "get 7")
    mapped.go()
    vm.check("ls /mnt > /dev/null")
    domain.kill_daemon()
    mapped.go()
    assert path.read_bytes()[6] == 66
    # It waits, and is refused (EAGAIN) where the machine is too slow for that.
    reads = "until md5sum < /mnt/new > /tmp/sum; do sleep 0.05; done"
    vm.check(f"({reads}; /mapped /mnt/new 4096 put 5 55; echo $? > /tmp/done) > /dev/null 2>&1 &")
    domain.start_daemon()
    vm.check("while [ ! -s /tmp/done ]; do sleep 0.05; done")
    assert vm.check("cat /tmp/sum").decode().split()[0] == digest(content(CHUNK, 9))
    assert new.read_bytes()[5] == 55
    with path.open("r+b") as file:
        file.seek(7)
        file.write(b"\x63")
    mapped.go(last=True)
    assert mapped.seen() == [content(8)[5], 66, 0x63]
    # The next coherenced knows what the one before has granted.
    domain.stock.check("truncate -s 0 /mnt/stays")
    eventually(vm, "stat -c %s /mnt/stays", b"0\n")
    assert vm.check("cat /mnt/stays") == b""


def test_a_backend_is_killed_while_its_guest_has_files_mapped(domain: Domain) -> None:
    """The last test: QEMU 11.1 does not connect again (docs/reference/vhost-user.md)."""
    vm, path = domain.mapping, domain.share / "orphan"
    path.write_bytes(content(CHUNK))
    # It does not come to its last stage: as it ends, its kernel may forget the file, and ask for that.
    mapped = Mapped(vm, "orphan", CHUNK, "get 5 put 4 44", "put 6 66 get 6", "get 7")
    mapped.go()
    os.kill(domain.backend.pid, signal.SIGKILL)
    domain.backend.process.wait(10)
    mapped.go()
    assert vm.check("cat /tmp/seen").split() == [b"%d" % content(6)[5], b"66"]
    # The others go on, and nobody waits for it.
    assert domain.stock.check("head -c 7 /mnt/orphan | tail -c 1") == bytes([66])
    domain.stock.check("echo gone > /mnt/elsewhere")
