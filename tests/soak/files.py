"""The files of a soak test: those of which each byte is known, and those that all change at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coherent_vfs.coherence.protocol.constants import CHUNK
from tests.soak.content import misplaced

EXACT: Final = 7
FREE: Final = 3
EXACT_BYTES: Final = 3 * CHUNK
FREE_BYTES: Final = 4 * CHUNK


@dataclass(frozen=True)
class Soaked:
    """A file of the share.

    Attributes:
        number: 1 to 255.
        exact: whether who changes it holds it, and keeps its model.
    """

    number: int
    exact: bool

    @property
    def name(self) -> str:
        return f"{'exact' if self.exact else 'free'}{self.number}"

    @property
    def most(self) -> int:
        """Bytes that it has at most."""
        return EXACT_BYTES if self.exact else FREE_BYTES


FILES: Final = [Soaked(number, number <= EXACT) for number in range(1, EXACT + FREE + 1)]


class Model:
    """What an exact file must hold: another file, on the host, that is changed in the same way without any guest.

    A byte in a lock file says who is changing it. Who dies meanwhile leaves it there; then only the same guest may go
    on, once it has a new session: a change that its backend was making is over then.

    Args:
        folder: of all models. share: with the files.
        file: an exact one.
    """

    def __init__(self, folder: Path, share: Path, file: Soaked) -> None:
        self.file = file
        self._real = share / file.name
        self._path = folder / file.name
        self._lock_fd = os.open(folder / f"{file.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        self._history_path = folder / f"{file.name}.history"
        self._history_fd = os.open(self._history_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self) -> None:
        os.close(self._lock_fd)
        os.close(self._fd)
        os.close(self._history_fd)

    def note(self, who: int, what: str) -> None:
        """Write down what is done to the file."""
        os.write(self._history_fd, f"{time.monotonic():.4f} guest {who}: {what}\n".encode())

    def history(self, most: int = 25) -> str:
        """What was done last."""
        return "\n".join(self._history_path.read_text().splitlines()[-most:])

    @property
    def changer(self) -> int:
        """Who is changing it, or has left it in the middle of that; 0: nobody."""
        return (os.pread(self._lock_fd, 1, 0) or b"\0")[0]

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the file, if nobody else does and nobody has left it: whether that is so."""
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield not self.changer
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def changing(self, who: int) -> Iterator[None]:
        """A change of the file, which is held; what ends it by an exception leaves it."""
        os.pwrite(self._lock_fd, bytes([who]), 0)
        yield
        os.pwrite(self._lock_fd, b"\0", 0)

    def recover(self, who: int) -> None:
        """Take over what the file holds, if this guest has left it. AssertionError when that cannot be."""
        if self.changer == who:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            data = self._real.read_bytes()
            assert not (wrong := misplaced(self.file.number, 0, data)), f"{self.file.name}: {wrong[:3]}"
            self.replace(data)
            os.pwrite(self._lock_fd, b"\0", 0)
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def write(self, data: bytes, offset: int) -> None:
        os.pwrite(self._fd, data, offset)

    def resize(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def punch(self, offset: int, length: int) -> None:
        """Zeros, as far as the file goes."""
        self.write(bytes(max(0, min(length, self.size - offset))), offset)

    def replace(self, data: bytes) -> None:
        self.resize(0)
        self.write(data, 0)

    def difference(self) -> str | None:
        """How the file on the host differs from the model; nothing is said of one that was left."""
        if self.changer:
            return None
        real, model = self._real.read_bytes(), self._path.read_bytes()
        if real == model:
            return None
        if len(real) != len(model):
            return f"{self.file.name} has {len(real)} bytes, not {len(model)}"
        first = next(at for at, (one, other) in enumerate(zip(real, model, strict=True)) if one != other)
        return f"{self.file.name} at {first}: {real[first : first + 8].hex()}, not {model[first : first + 8].hex()}"
