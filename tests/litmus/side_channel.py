"""Memory that all parties share beside the file system: barriers, "told", results.

A guest under QEMU has it as an ivshmem device, one under User-Mode Linux as /dev/mmapper, the host as a file: so a
word that one party stores is seen by another within a microsecond, and no party waits for the laboratory. The
layout is that of programs/litmus/side_channel.h.
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.litmus.litmus import Litmus, shown

PARTIES, LANES, REGISTERS = 4, 256, 8
SLOWEST_LOOK, SLOWEST_CHANGE = REGISTERS - 1, REGISTERS - 2
"""The registers that have how long a party's slowest look and its slowest change took, in microseconds."""
BYTES = 16 << 20
"""A power of two, as a PCI device needs."""
UNSET = -(1 << 31)
_FAILED = 0
_CELLS = 16
_CELL = 16
_RESULTS = _CELLS + LANES * PARTIES * _CELL
"""DomainPaths of words of 32 bits."""


class SideChannel:
    """The memory, in a file of its own. A context that removes it.

    Attributes:
        path: the file.
        words: its words, unsigned.
    """

    rounds = (BYTES // 4 - _RESULTS) // (PARTIES * REGISTERS)
    """How many rounds of all tests together one run can have."""

    def __init__(self) -> None:
        self.path = Path(f"/dev/shm/litmus-{os.getpid()}-{secrets.token_hex(4)}")
        with self.path.open("xb+") as file:
            file.truncate(BYTES)
            self._memory = mmap.mmap(file.fileno(), BYTES)
        self.words = memoryview(self._memory).cast("I")
        self._values = memoryview(self._memory).cast("i")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.words.release()
        self._values.release()
        self._memory.close()
        self.path.unlink()

    def reset(self, rounds: int) -> None:
        """Make it ready for a run of so many rounds."""
        for word in range(_RESULTS):
            self.words[word] = 0
        count = rounds * PARTIES * REGISTERS
        self._values[_RESULTS : _RESULTS + count] = memoryview(UNSET.to_bytes(4, "little", signed=True) * count).cast(
            "i"
        )

    @property
    def failed(self) -> bool:
        """Whether a party gave up."""
        return bool(self.words[_FAILED])

    def fail(self) -> None:
        """Tell the other parties not to wait."""
        self.words[_FAILED] = 1

    def arrived(self, lane: int, party: int) -> int:
        """The word with the last barrier that a party (from 0) came to in a lane."""
        return _CELLS + (lane * PARTIES + party) * _CELL

    def told(self, lane: int, party: int) -> int:
        """The word with the round's barrier at which a party told."""
        return self.arrived(lane, party) + 1

    def ended(self, lane: int, party: int) -> int:
        """The word with the round's barrier at which a party ended its program."""
        return self.arrived(lane, party) + 2

    def took(self, lane: int, party: int) -> int:
        """The word with the microseconds that a party's program took in the round before."""
        return self.arrived(lane, party) + 3

    def record(self, index: int, party: int, register: int, value: int) -> None:
        """Set a register of a party in a round of the run."""
        self._values[_RESULTS + (index * PARTIES + party) * REGISTERS + register] = value

    def slowest(self, index: int, register: int) -> float:
        """How long the slowest look, or change, of all parties in a round of the run took, in seconds."""
        first = _RESULTS + index * PARTIES * REGISTERS + register
        return max(self._values[first : first + PARTIES * REGISTERS : REGISTERS]) / 1e6

    def outcome(self, index: int, test: Litmus) -> str:
        """The registers of a round of the run."""
        values: list[int | None] = []
        for register in range(test.registers):
            first = _RESULTS + index * PARTIES * REGISTERS + register
            seen = [v for v in self._values[first : first + PARTIES * REGISTERS : REGISTERS] if v != UNSET]
            values.append(seen[0] if seen else None)
        return " ".join(map(shown, values))

    def machine(self, kind: str) -> dict[str, Any]:
        """What boot() needs so that a guest has the memory."""
        if kind == "uml":
            return {"append": f"iomem=mmapper,/host{self.path}"}
        memory = f"memory-backend-file,id=side,mem-path={self.path},size={BYTES},share=on"
        return {"extra": ["-object", memory, "-device", "ivshmem-plain,memdev=side"]}


# 0x1110: ivshmem; its memory is BAR 2.
_IVSHMEM = "$(dirname $(grep -lx 0x1110 /sys/bus/pci/devices/*/device))/resource2"
DEVICE = {"uml": "/dev/mmapper", "qemu": _IVSHMEM, "qemu-dax": _IVSHMEM}
"""Where a guest finds the memory, for its shell."""
