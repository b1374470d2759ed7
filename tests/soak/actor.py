"""A guest of a soak test: maps, loads, stores, writes, truncates and replaces files until it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import os
import random
import select
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import msgspec

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.guest.file import File
from coherent_vfs.guest.guest import Guest
from tests.soak.content import WORD, make, misplaced
from tests.soak.files import FILES, Model, Soaked
from tests.soak.messages import Held, Told

MOST: Final = 40_000
"""Bytes of a piece."""
VIEWS: Final = 3
"""That a guest keeps of files, of the chunks of its window."""
REST: Final = 0.02
"""Seconds between two steps, at most: eight guests and their backends fit on two processors."""
PATIENCE: Final = 60.0
"""Seconds that any answer may take: machines of tests are slow."""
GONE: Final = (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
"""What a guest sees when its backend was killed."""
PAGE: Final = 4096
_PUNCH: Final = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


@dataclass(frozen=True)
class View:
    """A piece of a file that is kept mapped."""

    file: Soaked
    inode: int
    offset: int
    memory: memoryview


class Wrong(Exception):
    """A guest saw what it must not see."""


class Actor:
    """The guest, and what it does.

    Args:
        number: its own, from 1.
        socket: of its backend.
        table: of the domain.
        folder: of the test: share/ and models/.
        seed: decides what it does.
    """

    def __init__(self, number: int, socket: Path, table: Path, folder: Path, seed: str) -> None:
        self._number = number
        self._socket = socket
        self._table = table
        self._share = folder / "share"
        self._mounted = folder / f"{number}.mounted"
        self._rng = random.Random(f"{seed}/{number}/{os.getpid()}")
        self._generation = 0
        self._counts: Counter[str] = Counter()
        self._models = {file: Model(folder / "models", self._share, file) for file in FILES if file.exact}
        self._guest: Guest | None = None
        self._open: dict[Soaked, File] = {}
        self._inodes: dict[int, int] = {}
        self._views: list[View] = []
        self._ended = False
        # Not buffered: select(2) would not tell of an order that was read together with the one before.
        self._orders = FileIO(0, closefd=False)

    def run(self) -> None:
        """Go on until told to end."""
        while not self._ended:
            if self._guest is None:
                self._connect()
            elif self._rng.random() < 0.001:
                self._counts["unmounted"] += 1
                self._leave()
            else:
                self._try(self._step)
            self._obey(self._rng.uniform(0, REST))
        self._leave()
        for model in self._models.values():
            model.close()

    # --- the session ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            self._guest = Guest.connect(self._socket, table=self._table, timeout=PATIENCE, dax="inode")
        except (OSError, UserError):
            self._obey(0.05)
            return
        assert self._guest.aware
        self._counts["mounted"] += 1
        self._mounted.write_text(str(time.monotonic()))
        for model in self._models.values():
            model.recover(self._number)

    def _leave(self) -> None:
        self._drop_views(*FILES)
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()
        self._open.clear()
        self._inodes.clear()
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            if error.errno == errno.EAGAIN:
                # coherenced was away for long.
                self._counts["refused"] += 1
            elif error.errno in GONE:
                self._counts["backend lost"] += 1
            else:
                raise
            self._leave()

    def _obey(self, seconds: float) -> None:
        """Do what the test asks for, which may come within so many seconds."""
        while select.select([self._orders], [], [], seconds)[0]:
            match msgspec.json.decode(self._orders.readline() or b'"end"'):
                case "tell":
                    print(msgspec.json.encode(Told(self._held(), dict(self._counts))).decode(), flush=True)
                    self._counts.clear()
                    # Until it is told to go on.
                    seconds = PATIENCE
                case "go on":
                    return
                case "end":
                    self._ended = True
                    return

    def _held(self) -> list[Held]:
        dax = None if self._guest is None else self._guest.tree.dax
        if dax is None:
            return []
        return [
            Held(self._inodes[it.nodeid], it.index * CHUNK, it.moffset, dax.window.is_mapped(it.moffset, CHUNK))
            for it in dax.chunks
        ]

    # --- steps ----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._counts["steps"] += 1
        if self._views and self._rng.random() < 0.2:
            view = self._views.pop(self._rng.randrange(len(self._views)))
            self._use(view)
            if self._rng.random() < 0.7:
                self._views.append(view)
            else:
                view.memory.release()
            return
        file = self._rng.choice(FILES)
        if not file.exact:
            self._free_step(file)
            return
        model = self._models[file]
        with model.held() as held:
            if held:
                with model.changing(self._number):
                    self._exact_step(file, model)

    def _file(self, soaked: Soaked) -> File:
        """The file, open; opened anew when another one has its name now."""
        assert self._guest is not None
        file = self._open.get(soaked)
        if file is not None and (
            self._rng.random() < 0.05 or self._inodes[file.node.nodeid] != (self._share / soaked.name).stat().st_ino
        ):
            self._open.pop(soaked).close()
            file = None
        if file is None:
            file = self._guest.open(f"/{soaked.name}", os.O_RDWR | os.O_CREAT)
            self._open[soaked] = file
            self._inodes[file.node.nodeid] = file.stat().st_ino
        return file

    def _piece(self, file: Soaked) -> tuple[int, int]:
        """A part of a file: offset and length. Often around the border of a chunk or of a page."""
        length = self._rng.randrange(1, MOST if self._rng.random() < 0.3 else 2000)
        offset = self._rng.randrange(file.most - length)
        if self._rng.random() < 0.3:
            border = CHUNK if self._rng.random() < 0.5 else PAGE
            offset = max(0, offset // border * border - self._rng.randrange(length))
        # Whole words, where nothing else tells what belongs.
        return (offset, length) if file.exact else (offset // WORD * WORD, -(-length // WORD) * WORD)

    def _content(self, file: Soaked, offset: int, length: int) -> bytes:
        self._generation += 1
        return make(file.number, offset, length, self._number, self._generation)

    def _exact_step(self, soaked: Soaked, model: Model) -> None:
        file = self._file(soaked)
        offset, length = self._piece(soaked)
        what = self._rng.choice(
            ("read", "read", "write", "write", "view", "view", "truncate", "grow", "punch", "replace")
        )
        model.note(self._number, f"{what} {length} at {offset}, size {model.size}, inode {file.stat().st_ino}")
        match what:
            case "read":
                self._same("read", soaked, offset, file.pread(length, offset), model.read(length, offset))
            case "write":
                data = self._content(soaked, offset, length)
                file.pwrite(data, offset)
                model.write(data, offset)
                self._same("read after write", soaked, offset, file.pread(length, offset), data)
            case "view":
                self._map(soaked, file, offset, min(length, model.size - offset))
            case "truncate" if offset < model.size:
                file.truncate(offset)
                model.resize(offset)
                self._size(soaked, file, offset)
            case "grow" if offset > model.size:
                file.truncate(offset)
                model.resize(offset)
                self._size(soaked, file, offset)
            case "punch":
                file.fallocate(_PUNCH, offset, length)
                model.punch(offset, length)
                self._same("read after punch", soaked, offset, file.pread(length, offset), model.read(length, offset))
            case "replace" if self._rng.random() < 0.3:
                self._replace(soaked, model, offset, length)

    def _replace(self, soaked: Soaked, model: Model, offset: int, length: int) -> None:
        """Another file in its place, while others may have it mapped."""
        assert self._guest is not None
        data = self._content(soaked, offset, length)
        self._counts["replaced"] += 1
        name = f"/new{self._number}"
        with self._guest.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            file.pwrite(data, offset)
        self._guest.rename(name, f"/{soaked.name}")
        model.replace(bytes(offset) + data)

    def _map(self, soaked: Soaked, file: File, offset: int, length: int) -> None:
        length = min(length, CHUNK - offset % CHUNK)
        if length <= 0:
            return
        while len(self._views) >= VIEWS:
            self._views.pop(0).memory.release()
        view = View(soaked, self._inodes[file.node.nodeid], offset, file.mmap(length, offset))
        self._views.append(view)
        self._load_and_store(view)

    def _drop_views(self, *files: Soaked) -> None:
        for view in [view for view in self._views if view.file in files]:
            view.memory.release()
            self._views.remove(view)

    def _use(self, view: View) -> None:
        """Access what is mapped since a while, as far as the file goes: anybody may have changed it."""
        if not view.file.exact:
            if self._file(view.file).stat().st_size >= view.offset + len(view.memory):
                self._load_and_store(view)
            return
        model = self._models[view.file]
        with model.held() as held:
            if not held:
                return
            with model.changing(self._number):
                file = self._file(view.file)
                still = self._inodes[file.node.nodeid] == view.inode
                if still and file.stat().st_size >= view.offset + len(view.memory):
                    self._load_and_store(view)

    def _load_and_store(self, view: View) -> None:
        file, length = view.file, len(view.memory)
        store = self._rng.random() < 0.5
        if not file.exact:
            self._belongs(file, view.offset, bytes(view.memory))
            if store:
                view.memory[:] = self._content(file, view.offset, length)
            return
        model = self._models[file]
        self._same("load", file, view.offset, bytes(view.memory), model.read(length, view.offset))
        model.note(self._number, f"{'store' if store else 'load'} {length} at {view.offset}, size {model.size}")
        if store:
            data = self._content(file, view.offset, length)
            view.memory[:] = data
            model.write(data, view.offset)

    def _free_step(self, soaked: Soaked) -> None:
        file = self._file(soaked)
        offset, length = self._piece(soaked)
        match self._rng.choice(("read", "read", "read", "write", "write", "view", "view", "truncate", "punch")):
            case "read":
                self._belongs(soaked, offset, file.pread(length, offset))
            case "write":
                file.pwrite(self._content(soaked, offset, length), offset)
            case "view":
                self._map(soaked, file, offset, min(length, file.stat().st_size - offset))
            case "truncate":
                # From its own truncation no guest is kept.
                self._drop_views(soaked)
                file.truncate(offset)
            case "punch":
                file.fallocate(_PUNCH, offset, length)

    # --- what must be seen ----------------------------------------------------------------------------------

    def _same(self, how: str, file: Soaked, offset: int, seen: bytes, wanted: bytes) -> None:
        self._counts["compared"] += 1
        if seen == wanted:
            return
        if len(seen) != len(wanted):
            raise Wrong(f"{file.name} at {offset}: {len(seen)} bytes, not {len(wanted)}")
        at = next(at for at, (one, other) in enumerate(zip(seen, wanted, strict=True)) if one != other)
        was, to_be = seen[at : at + WORD].hex(), wanted[at : at + WORD].hex()
        with (self._share / file.name).open("rb") as host:
            is_ = os.pread(host.fileno(), WORD, offset + at).hex()
        where = f"{how} of {file.name} at {offset}, {len(seen)} bytes: at {offset + at}"
        raise Wrong(f"{where} {was}, not {to_be}; on the host {is_}; before:\n{self._models[file].history()}")

    def _size(self, file: Soaked, seen: File, wanted: int) -> None:
        if (size := seen.stat().st_size) != wanted:
            raise Wrong(f"{file.name} has {size} bytes, not {wanted}")

    def _belongs(self, file: Soaked, offset: int, data: bytes) -> None:
        """Each byte is one that was written there, by anybody."""
        self._counts["examined"] += 1
        for at, word in misplaced(file.number, offset, data):
            raise Wrong(f"{file.name} at {at}: {word:016x} does not belong there")


def main() -> int:
    parser = argparse.ArgumentParser(description="A guest of a soak test, which starts it.")
    parser.add_argument("number", type=int)
    for name in ("socket", "table", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("seed")
    words = parser.parse_args()
    faulthandler.enable()
    actor = Actor(words.number, words.socket, words.table, words.folder, words.seed)
    try:
        actor.run()
    except Wrong as wrong:
        print(f"{time.time():.3f} guest {words.number}: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
