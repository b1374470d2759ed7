"""Two real guests on QEMU 11.1 that map files: every size, every change by this guest, the other one, and the host."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab import assets, backends
from tests.lab.guest import Guest, boot
from tests.vm.dax_place import DaxPlace, dax_place

PROGRAM = Path(__file__).with_name("programs") / "mapped"
CHUNK = 2 << 20
SIZES = (0, 1, 4095, 4096, 4097, 5000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4096, 3 * CHUNK + 77)
LEASE_MAX = 0.5
SECONDS = 20.0


@pytest.fixture(scope="module")
def place() -> Iterator[DaxPlace]:
    with dax_place() as place:
        yield place


@pytest.fixture(scope="module")
def share(place: DaxPlace) -> Path:
    """The directory."""
    return place.share


@pytest.fixture(scope="module")
def guests(place: DaxPlace) -> Iterator[tuple[Guest, Guest]]:
    """Two guests that have it at /mnt and map its files."""
    program = assets.compile_static(PROGRAM).read_bytes()
    found = []
    with ExitStack() as stack:
        daemon = stack.enter_context(backends.daemon(place.folder, place.table))
        for number in range(2):
            run_dir = place.folder / str(number)
            run_dir.mkdir()
            options = place.coherence(daemon)
            options += ["--dax", "always", "--dax-window", "16M", "--lease-max", str(LEASE_MAX)]
            backend = stack.enter_context(backends.ours(place.share, run_dir, cache="shared", options=options))
            vm = stack.enter_context(boot("qemu-dax", shares={"share": backend.socket}))
            vm.mount("share", "/mnt", "dax=always" if number else "dax=inode")
            vm.put_file("/mapped", program)
            found.append(vm)
        yield found[0], found[1]


def digest(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sum_of(vm: Guest, name: str) -> str:
    return vm.check(f"md5sum < /mnt/{name}").decode().split()[0]


def content(size: int, seed: int = 0) -> bytes:
    return bytes((number * 7 + seed) % 251 for number in range(8192)) * (size // 8192) + bytes(
        (number * 7 + seed) % 251 for number in range(size % 8192)
    )


def eventually(vm: Guest, command: str, wanted: bytes) -> None:
    """For what the host changes, which nobody waits for."""
    deadline = time.monotonic() + SECONDS
    while (seen := vm.check(command)) != wanted:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


class Mapped:
    """The program, in the background of a guest; each step is a list of words.

    Args:
        vm: the guest.
        name: of the file, length: of the mapping.
        stages: words of its steps; it goes from one to the next when go() is called.
    """

    def __init__(self, vm: Guest, name: str, length: int, *stages: str) -> None:
        self._vm = vm
        self._stage = 0
        words = [f"tell /tmp/at-{number} wait /tmp/go-{number} {stage}" for number, stage in enumerate(stages)]
        vm.check("rm -f /tmp/at-* /tmp/go-* /tmp/seen /tmp/end")
        vm.check(
            f"(/mapped /mnt/{name} {length} {' '.join(words)} >/tmp/seen 2>&1; echo $? >/tmp/end) >/dev/null 2>&1 &"
        )

    def go(self, *, last: bool = False) -> None:
        """Let it do the next stage, and wait until that is done."""
        self._vm.check(f"while [ ! -e /tmp/at-{self._stage} ]; do sleep 0.01; done; touch /tmp/go-{self._stage}")
        self._stage += 1
        done = "/tmp/end" if last else f"/tmp/at-{self._stage}"
        self._vm.check(f"while [ ! -s {done} -a ! -e /tmp/at-{self._stage} ]; do sleep 0.01; done")

    def seen(self) -> list[int]:
        """The bytes that it has loaded, once it has ended as it should."""
        assert self._vm.check("cat /tmp/end").strip() == b"0", self._vm.check("cat /tmp/seen")
        return [int(line) for line in self._vm.check("cat /tmp/seen").split()]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_read_to_its_last_byte(guests: tuple[Guest, Guest], share: Path, size: int) -> None:
    data = content(size, size % 13)
    (share / f"size{size}").write_bytes(data)
    for vm in guests:
        assert sum_of(vm, f"size{size}") == digest(data)


def test_guests_and_host_share_stores(guests: tuple[Guest, Guest], share: Path) -> None:
    first, second = guests
    (share / "stores").write_bytes(content(CHUNK + 5000))
    first.check(f"/mapped /mnt/stores {CHUNK + 5000} put 5 200 put {CHUNK + 4999} 201")
    data = (share / "stores").read_bytes()
    assert (data[5], data[CHUNK + 4999]) == (200, 201)
    assert second.check(f"/mapped /mnt/stores {CHUNK + 5000} get 5 get {CHUNK + 4999}") == b"200\n201\n"
    mapped = Mapped(second, "stores", 4096, "get 7", "get 7", "get 7 put 8 77")
    mapped.go()
    first.check("/mapped /mnt/stores 4096 put 7 33")
    mapped.go()
    with (share / "stores").open("r+b") as file:
        file.seek(7)
        file.write(b"\x63")
    mapped.go(last=True)
    assert mapped.seen() == [data[7], 33, 0x63]
    assert (share / "stores").read_bytes()[8] == 77
    assert first.check("/mapped /mnt/stores 4096 get 8") == b"77\n"


def test_files_that_grow(guests: tuple[Guest, Guest], share: Path) -> None:
    """By a few bytes and by chunks, in each guest and on the host; the others read all of it."""
    path, data = share / "grows", content(10)
    path.write_bytes(data)
    for number, piece in enumerate((5, 4090, 4096, 100_000, CHUNK, 1)):
        more = content(piece, number + 1)
        if number % 3 == 2:
            with path.open("ab") as file:
                file.write(more)
        else:
            guests[number % 3].check("cat >> /mnt/grows", stdin=more)
        data += more
        for vm in guests:
            eventually(vm, "stat -c %s /mnt/grows", b"%d\n" % len(data))
            assert sum_of(vm, "grows") == digest(data)


@pytest.mark.parametrize("who", ["guest", "host"])
@pytest.mark.parametrize("size", [0, 100, 4096, CHUNK + 4097])
def test_a_file_is_cut_off_while_another_guest_has_it_mapped(
    guests: tuple[Guest, Guest], share: Path, who: str, size: int
) -> None:
    """The other guest lives on, sees what is left, and all of it when it has grown again."""
    first, second = guests
    whole = 2 * CHUNK + 5000
    path, data = share / f"cut-{who}-{size}", content(whole)
    path.write_bytes(data)
    touch = f"get 10 get {CHUNK + 10} get {2 * CHUNK + 4000}"
    mapped = Mapped(second, path.name, whole, touch, *(["get 50"] if size else []), "get 10")
    mapped.go()
    if who == "guest":
        first.check(f"truncate -s {size} /mnt/{path.name}")
    else:
        os.truncate(path, size)
    eventually(second, f"stat -c %s /mnt/{path.name}", b"%d\n" % size)
    if size:
        mapped.go()
    assert sum_of(second, path.name) == digest(data[:size])
    more = content(whole - size, 5)
    first.check(f"cat >> /mnt/{path.name}", stdin=more)
    eventually(second, f"stat -c %s /mnt/{path.name}", b"%d\n" % whole)
    mapped.go(last=True)
    result = data[:size] + more
    assert sum_of(second, path.name) == digest(result)
    assert mapped.seen()[-1] == result[10]
    assert sum_of(first, path.name) == digest(result)


def test_a_guest_that_has_not_heard_of_a_truncation_reads_on(guests: tuple[Guest, Guest], share: Path) -> None:
    """It maps what is not there any more, and sees zeros there: its kernel goes by the size that it knows."""
    first, second = guests
    (share / "unheard").write_bytes(content(2 * CHUNK))
    mapped = Mapped(second, "unheard", 2 * CHUNK, "get 5", f"get {CHUNK + 5}")
    mapped.go()
    first.check("truncate -s 100 /mnt/unheard")
    mapped.go(last=True)
    assert mapped.seen() == [content(6)[5], 0]
    assert second.check("stat -c %s /mnt/unheard") == b"100\n"
    assert (share / "unheard").read_bytes() == content(2 * CHUNK)[:100]


def test_a_file_is_removed_or_replaced_while_it_is_mapped(guests: tuple[Guest, Guest], share: Path) -> None:
    first, second = guests
    for name, change in (("gone", "rm /mnt/gone"), ("other", "echo new > /mnt/n; mv /mnt/n /mnt/other")):
        (share / name).write_bytes(content(5000))
        mapped = Mapped(second, name, 5000, "get 5", "put 6 99 get 5 get 6")
        mapped.go()
        first.check(change)
        mapped.go(last=True)
        assert mapped.seen() == [content(6)[5], content(6)[5], 99]
    assert second.run("cat /mnt/gone").status != 0
    assert second.check("cat /mnt/other") == b"new\n"


def test_more_files_than_fit_into_the_window(guests: tuple[Guest, Guest], share: Path) -> None:
    vm = guests[0]
    for number in range(12):
        (share / f"many{number}").write_bytes(content(CHUNK + number, number))
    for _ in range(2):
        for number in range(12):
            assert sum_of(vm, f"many{number}") == digest(content(CHUNK + number, number))


def test_a_guest_that_mounts_anew_maps_anew(guests: tuple[Guest, Guest], share: Path) -> None:
    vm = guests[0]
    (share / "again").write_bytes(content(CHUNK + 1))
    for _ in range(2):
        assert sum_of(vm, "again") == digest(content(CHUNK + 1))
        vm.check("umount /mnt && mount -t virtiofs -o dax=inode share /mnt")
