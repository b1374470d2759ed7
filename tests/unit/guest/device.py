"""A tiny virtio device in Python, which can misbehave: the other side of guest.ring.Ring."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from coherent_vfs.guest.ring import Ring

NEXT, WRITE, INDIRECT = 1, 2, 4
DESCRIPTOR = struct.Struct("<QIHH")


@dataclass
class Chain:
    """A chain of descriptors: its head, what the driver wrote, and where the device may write."""

    head: int
    readable: list[bytes]
    writable: list[tuple[int, int]]

    @property
    def request(self) -> bytes:
        """All that the driver wrote."""
        return b"".join(self.readable)


class Device:
    """Takes chains from a ring and gives them back."""

    def __init__(self, memory: bytearray | memoryview, ring: Ring) -> None:
        self.memory = memoryview(memory).cast("B")
        self.ring = ring
        self._taken = 0

    def word(self, at: int, value: int | None = None) -> int:
        """A 16-bit word, after setting it if a value is given."""
        if value is not None:
            self.memory[at : at + 2] = struct.pack("<H", value & 0xFFFF)
        return int(struct.unpack("<H", self.memory[at : at + 2])[0])

    @property
    def waiting(self) -> int:
        """Chains that the driver made available and that were not taken."""
        return (self.word(self.ring.available + 2) - self._taken) & 0xFFFF

    def take(self) -> Chain:
        """The next chain."""
        assert self.waiting
        head = self.word(self.ring.available + 4 + 2 * (self._taken % self.ring.size))
        self._taken = (self._taken + 1) & 0xFFFF
        chain = Chain(head, [], [])
        table, index = self.ring.descriptors, head
        while True:
            address, length, flags, following = DESCRIPTOR.unpack_from(self.memory, table + 16 * index)
            if flags & INDIRECT:
                assert flags == INDIRECT
                table, index = address, 0
                continue
            if flags & WRITE:
                chain.writable.append((address, length))
            else:
                assert not chain.writable
                chain.readable.append(bytes(self.memory[address : address + length]))
            if not flags & NEXT:
                return chain
            index = following

    def use(self, head: int, length: int) -> None:
        """Give a chain back."""
        index = self.word(self.ring.used + 2)
        at = self.ring.used + 4 + 8 * (index % self.ring.size)
        self.memory[at : at + 8] = struct.pack("<II", head, length)
        self.word(self.ring.used + 2, index + 1)

    def answer(self, chain: Chain, reply: bytes) -> None:
        """Write a reply into a chain and give it back."""
        rest = reply
        for address, length in chain.writable:
            self.memory[address : address + len(rest[:length])] = rest[:length]
            rest = rest[length:]
        assert not rest
        self.use(chain.head, len(reply))

    def want_kick(self, want: bool, event_idx: bool) -> None:
        """Say whether to be told of the next chain."""
        if event_idx:
            # The next index if so, else the one just before, which comes again after 65,535 others.
            self.word(self.ring.used + 4 + 8 * self.ring.size, self._taken if want else self._taken - 1)
        else:
            self.word(self.ring.used, 0 if want else 1)

    @property
    def wants_call(self) -> int:
        """The index after whose use the driver wants to be called (EVENT_IDX)."""
        return self.word(self.ring.available + 4 + 2 * self.ring.size)
