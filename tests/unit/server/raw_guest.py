"""A guest that writes its rings by hand, rightly or wrongly, against the real device in this process."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.server.device.device import FsDevice
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.fuse.protocol import IN_HEADER, INIT_IN, OUT_HEADER, InitFlag, Opcode
from coherent_vfs.server.host import credentials
from coherent_vfs.server.settings import Settings
from coherent_vfs.server.vhost_user.interface import Region, Ring

SIZE = 1 << 22
USER = 0x7000_0000_0000
GUEST = 0x1_0000_0000
QUEUE_SIZE = 64
DESC, AVAIL, USED = 0x0, 0x1000, 0x2000
HEAP = 0x10000
HIPRIO = 0x4000
"""How far the rings of the hiprio queue, which stays empty, are from those of the request queue."""
PENDING, PENDING_SIZE, PENDING_MAX = 0x300000, 0x8000, 31
"""Where requests lie that are sent beside others, how much room each has, and how many there can be."""

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
class Pending:
    """A request in the ring.

    Attributes:
        head: of its chain; the next descriptor is that of the reply.
        at: of the request, and `reply` of the reply, in guest memory.
    """

    guest: RawGuest
    head: int
    unique: int
    at: int
    reply: int

    @property
    def done(self) -> bool:
        """Whether the device has given the chain back."""
        self.guest.collect()
        return self.head in self.guest.answered

    @property
    def outcome(self) -> tuple[int, bytes]:
        """The errno and the body of the reply, which must be there."""
        assert self.done, "the request was not served"
        length = self.guest.answered[self.head]
        size, error, unique = OUT_HEADER.unpack_from(self.guest.memory, self.reply)
        assert unique == self.unique
        assert size == length
        return -error, self.guest.memory[self.reply + OUT_HEADER.size : self.reply + length]


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
    collected: int = 0
    answered: dict[int, int] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)

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
        pending = self._send(opcode, nodeid, body, room, **header)
        return pending.outcome

    def tell(self, opcode: int, nodeid: int, body: bytes = b"") -> None:
        """Send one request that has no reply."""
        assert self.answered[self._send(opcode, nodeid, body, 0).head] == 0

    def post(self, opcode: int, nodeid: int, body: bytes = b"", room: int = 4096, **header: int) -> Pending:
        """Put a request beside others into the ring and let it be served, or not yet."""
        busy = {pending.head for pending in self.pending if not pending.done}
        number = next(n for n in range(PENDING_MAX) if 2 * n + 2 not in busy)
        at = PENDING + number * PENDING_SIZE
        pending = self._put(2 * number + 2, at, at + PENDING_SIZE // 2, opcode, nodeid, body, room, **header)
        self.pending = [one for one in self.pending if one.head in busy] + [pending]
        self.serve()
        return pending

    def wait(self, what: Callable[[], bool], seconds: float = 60.0) -> None:
        """Serve until something is so."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it never came about"
            self.loop.call_later(0.002, self.loop.stop)
            self.loop.run()

    def drain(self) -> None:
        """Let the device finish what is parked, as before its ring is stopped."""
        drained: list[int] = []
        self.device.drain(lambda: drained.append(self.device.parked))
        self.wait(lambda: bool(drained))
        assert drained == [0]

    def collect(self) -> None:
        """Take note of what the device has given back."""
        while self.collected != self.used_idx:
            head, length = self.used(self.collected)
            self.answered[head] = length
            self.collected = (self.collected + 1) & 0xFFFF

    def _send(self, opcode: int, nodeid: int, body: bytes, room: int, **header: int) -> Pending:
        pending = self._put(0, HEAP, HEAP + (1 << 20), opcode, nodeid, body, room, **header)
        self.serve()
        assert pending.done, "the request was not served"
        return pending

    def _put(
        self, head: int, at: int, reply: int, opcode: int, nodeid: int, body: bytes, room: int, **header: int
    ) -> Pending:
        self.collect()
        self.answered.pop(head, None)
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
        self.memory[at : at + len(message)] = message
        self.memory[reply : reply + OUT_HEADER.size] = bytes(OUT_HEADER.size)
        self.write_table(
            [
                Desc(GUEST + at, len(message), NEXT, head + 1),
                Desc(GUEST + reply, OUT_HEADER.size + room, WRITE),
            ],
            DESC + 16 * head,
        )
        self.offer(head)
        return Pending(self, head, self.unique, at, reply)

    def start_hiprio(self) -> None:
        """Run the hiprio queue, too; nothing comes on it, but it lets go of what is not used any more."""
        at = USER + HIPRIO
        ring = Ring(QUEUE_SIZE, at + DESC, at + USED, at + AVAIL, 0, os.eventfd(0), os.eventfd(0), None)
        self.device.start_ring(0, ring)
        self.device.enable_ring(0, True)

    def initialize(self, *, opens: bool = True) -> None:
        """Begin a session with all that there is; opens: but open files by itself."""
        flags = 0xFFFFFFFF & ~(InitFlag.NO_OPEN_SUPPORT if opens else 0)
        error, _ = self.request(Opcode.INIT, 0, INIT_IN.pack(7, 41, 131072, flags, 0xFFFFFFFF))
        assert error == 0


@contextmanager
def raw_guest(
    share: Path,
    *,
    event_idx: bool = False,
    init: bool = True,
    opens: bool = True,
    membership: Membership | None = None,
    **settings: object,
) -> Iterator[RawGuest]:
    """A device on a directory with one running request queue.

    Args:
        share: the directory.
        event_idx: negotiate VIRTIO_RING_F_EVENT_IDX.
        init: begin a session.
        opens: the guest sends OPEN, even where it needs not.
        membership: of a domain.
        settings: any of server.settings.Settings.
    """
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
            guest.initialize(opens=opens)
        yield guest
    finally:
        device.close()
        memory.close()
        for fd in (memory_fd, kick, call, root_fd):
            os.close(fd)
