"""A guest that writes its rings by hand, rightly or wrongly, against the real device in this process."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coherence.membership import Membership
from server import credentials
from server.device import FsDevice
from server.fuse.protocol import IN_HEADER, INIT_IN, OUT_HEADER, InitFlag, Opcode
from server.loop import EventLoop
from server.settings import Settings
from server.vhost_user.interface import Region, Ring

SIZE = 1 << 22
USER = 0x7000_0000_0000
GUEST = 0x1_0000_0000
QUEUE_SIZE = 64
DESC, AVAIL, USED = 0x0, 0x1000, 0x2000
HEAP = 0x10000

NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass(frozen=True)
class Desc:
    """One descriptor; addr is a guest address."""

    addr: int
    len: int
    flags: int = 0
    next: int = 0

    def encode(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.len, self.flags, self.next)


@dataclass
class RawGuest:
    """Guest memory, one request queue, and the loop that serves it."""

    device: FsDevice
    loop: EventLoop
    memory: mmap.mmap
    memory_fd: int
    kick: int
    call: int
    avail_idx: int = 0
    unique: int = 0

    def write_table(self, descs: Sequence[Desc], at: int = DESC) -> None:
        self.memory[at : at + 16 * len(descs)] = b"".join(desc.encode() for desc in descs)

    def offer(self, head: int, *, index: int | None = None) -> None:
        """Put a head into the available ring; index overrides what the driver says it has reached."""
        at = AVAIL + 4 + 2 * (self.avail_idx % QUEUE_SIZE)
        self.memory[at : at + 2] = struct.pack("<H", head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory[AVAIL + 2 : AVAIL + 4] = struct.pack("<H", self.avail_idx if index is None else index)

    @property
    def used_idx(self) -> int:
        return int(struct.unpack_from("<H", self.memory, USED + 2)[0])

    def used(self, index: int) -> tuple[int, int]:
        """Head and length of an element of the used ring."""
        head, length = struct.unpack_from("<II", self.memory, USED + 4 + 8 * (index % QUEUE_SIZE))
        return head, length

    def serve(self) -> None:
        """Kick, and let the device serve all that it finds."""
        os.eventfd_write(self.kick, 1)
        self.loop.call_later(0, self.loop.stop)
        self.loop.run()

    def request(
        self, opcode: int, nodeid: int, body: bytes = b"", room: int = 4096, **header: int
    ) -> tuple[int, bytes]:
        """Send one request: (errno, body of the reply)."""
        reply, length = self._send(opcode, nodeid, body, room, **header)
        size, error, unique = OUT_HEADER.unpack_from(reply)
        assert unique == self.unique
        assert size == length
        return -error, reply[OUT_HEADER.size : length]

    def tell(self, opcode: int, nodeid: int, body: bytes = b"") -> None:
        """Send one request that has no reply."""
        _, length = self._send(opcode, nodeid, body, 0)
        assert length == 0

    def _send(self, opcode: int, nodeid: int, body: bytes, room: int, **header: int) -> tuple[bytes, int]:
        self.unique += 1
        message = IN_HEADER.pack(
            header.get("len", IN_HEADER.size + len(body)),
            opcode,
            self.unique,
            nodeid,
            header.get("uid", 0),
            header.get("gid", 0),
            1,
            0,
        )
        message += body
        self.memory[HEAP : HEAP + len(message)] = message
        reply = HEAP + (1 << 20)
        self.memory[reply : reply + OUT_HEADER.size] = bytes(OUT_HEADER.size)
        self.write_table(
            [Desc(GUEST + HEAP, len(message), NEXT, 1), Desc(GUEST + reply, OUT_HEADER.size + room, WRITE)]
        )
        before = self.used_idx
        self.offer(0)
        self.serve()
        assert self.used_idx == (before + 1) & 0xFFFF, "the request was not served"
        head, length = self.used(before)
        assert head == 0
        return self.memory[reply : reply + OUT_HEADER.size + room], length

    def initialize(self) -> None:
        # All that there is, but to open its files by itself.
        flags = 0xFFFFFFFF & ~InitFlag.NO_OPEN_SUPPORT
        error, _ = self.request(Opcode.INIT, 0, INIT_IN.pack(7, 41, 131072, flags, 0xFFFFFFFF))
        assert error == 0


@contextmanager
def raw_guest(
    share: Path,
    *,
    event_idx: bool = False,
    init: bool = True,
    membership: Membership | None = None,
    **settings: object,
) -> Iterator[RawGuest]:
    """A device on a directory with one running request queue."""
    credentials.prepare()
    root_fd = os.open(share, os.O_PATH | os.O_DIRECTORY)
    loop = EventLoop()
    device = FsDevice(Settings(shared_dir=share, root_fd=root_fd, tag="test", **settings), loop, membership)  # type: ignore[arg-type]  # any setting, by name
    device.set_features(device.features if event_idx else 1 << 32 | 1 << 28)
    memory_fd = os.memfd_create("guest")
    os.truncate(memory_fd, SIZE)
    memory = mmap.mmap(memory_fd, SIZE)
    kick, call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    device.set_memory([Region(GUEST, SIZE, USER, 0, os.dup(memory_fd))])
    device.start_ring(1, Ring(QUEUE_SIZE, USER + DESC, USER + USED, USER + AVAIL, 0, os.dup(kick), os.dup(call), None))
    device.enable_ring(1, True)
    guest = RawGuest(device, loop, memory, memory_fd, kick, call)
    try:
        if init:
            guest.initialize()
        yield guest
    finally:
        device.close()
        memory.close()
        for fd in (memory_fd, kick, call, root_fd):
            os.close(fd)
