"""Players that are user-space guests: the same programs, by the driver in guest/."""

from __future__ import annotations

import math
import os
import random
import stat
import threading
import time
from collections.abc import Callable

from coherent_vfs.guest.file import File
from coherent_vfs.guest.guest import Guest
from tests.litmus.litmus import LOOKS, Litmus, number_in
from tests.litmus.places import OLD_MTIME
from tests.litmus.run import Run, error_number
from tests.litmus.side_channel import SLOWEST_CHANGE, SLOWEST_LOOK, UNSET

PATIENCE = 60.0
"""Seconds."""


class Disagreement(Exception):
    """The parties are not together any more."""


class UserSpace:
    """A user-space guest."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def play(self, run: Run, number: int) -> None:
        """As Player.play()."""
        errors: list[BaseException] = []

        def lane(index: int) -> None:
            try:
                _Lane(self._guest, run, number - 1, index).play()
            except BaseException as error:
                run.side.fail()
                errors.append(error)

        threads = [threading.Thread(target=lane, args=(index,)) for index in range(run.lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # Who was only waiting for the others has nothing to tell.
            raise next((error for error in errors if not isinstance(error, Disagreement)), errors[0])


class _Lane:
    """programs/litmus/main.c in Python."""

    def __init__(self, guest: Guest, run: Run, party: int, lane: int) -> None:
        self._guest = guest
        self._run = run
        self._party = party
        self._lane = lane
        self._parties = 0
        self._moment = 0.0
        """When the parties before this one have ended, if they take as long as in the round before."""
        self._slowest: dict[int, int] = {}

    def play(self) -> None:
        barrier = 1
        for position, test in enumerate(self._run.tests):
            for round_ in range(self._run.rounds):
                index = position * self._run.rounds + round_
                if index % self._run.lanes == self._lane:
                    if self._party < len(test.parties):
                        self._round(test, round_, index, barrier)
                    barrier += 2

    def _round(self, test: Litmus, round_: int, index: int, barrier: int) -> None:
        dice = random.Random(f"{self._run.seed} {index} {self._party}")
        self._parties = len(test.parties)
        self._slowest = dict.fromkeys((SLOWEST_LOOK, SLOWEST_CHANGE), UNSET)
        side, part = self._run.side, self._run.part(test, self._party + 1)
        place = Place(self._guest, f"/{self._run.folder}/{test.name}/{round_:05}", self._party + 1)
        for step in part.warm:
            self._perform(place, index, *step.split())
        took = max((side.words[side.took(self._lane, other)] for other in range(self._party)), default=0)
        self._moment = time.monotonic()
        self._meet(barrier)
        began = time.monotonic()
        self._moment = began + took / 1e6
        for step in part.steps:
            self._delay(dice)
            if not self._step(step, place, index, barrier):
                break
        side.words[side.took(self._lane, self._party)] = round(1e6 * (time.monotonic() - began))
        side.words[side.told(self._lane, self._party)] = barrier
        side.words[side.ended(self._lane, self._party)] = barrier
        place.leave()
        self._meet(barrier + 1)

    def _delay(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            return
        length = self._moment - time.monotonic() - 2 ** dice.uniform(0, 17) / 1e6 if dice.random() < 0.5 else 0
        time.sleep(length if length > 0 else 2 ** dice.uniform(0, 11) / 1e6)

    def _step(self, step: str, place: Place, index: int, barrier: int) -> bool:
        side = self._run.side
        match step.split():
            case ["tell"]:
                side.words[side.told(self._lane, self._party)] = barrier
            case ["await", party]:
                self._await(side.told(self._lane, int(party) - 1), barrier, int(party))
                time.sleep(self._run.settle_ms / 1000)
            case [register, "=", "until", wanted, *words]:
                value = self._until(place, words, int(wanted), index, barrier)
                side.record(index, self._party, int(register[1:]), value)
                return value == int(wanted)
            case [register, "=", *words]:
                side.record(index, self._party, int(register[1:]), self._perform(place, index, *words))
            case words:
                self._perform(place, index, *words)
        return True

    def _until(self, place: Place, words: list[str], wanted: int, index: int, barrier: int) -> int:
        side, ended = self._run.side, math.inf
        before = range(self._party) if self._party else range(1, self._parties)
        others = [side.ended(self._lane, other) for other in before]
        while True:
            # The look that may be the last one begins after all has been done.
            if ended == math.inf and all(side.words[word] >= barrier for word in others):
                ended = time.monotonic()
            last = time.monotonic() - ended >= self._run.settle_ms / 1000
            value = self._perform(place, index, *words)
            if value == wanted or last:
                return value
            _back_off(self._moment)

    def _perform(self, place: Place, index: int, *words: str) -> int:
        start = time.monotonic()
        value = place.perform(*words)
        took = round((time.monotonic() - start) * 1e6)
        register = SLOWEST_LOOK if words[0] in LOOKS else SLOWEST_CHANGE
        if took > self._slowest[register]:
            self._slowest[register] = took
            self._run.side.record(index, self._party, register, took)
        return value

    def _meet(self, barrier: int) -> None:
        side = self._run.side
        side.words[side.arrived(self._lane, self._party)] = barrier
        for other in range(self._parties):
            self._await(side.arrived(self._lane, other), barrier, other + 1)

    def _await(self, word: int, number: int, party: int) -> None:
        side, start = self._run.side, time.monotonic()
        while side.words[word] < number:
            if side.failed or time.monotonic() - start > PATIENCE:
                raise Disagreement(f"party {party} did not come on")
            _back_off(self._moment)


def _back_off(moment: float) -> None:
    distance = time.monotonic() - moment
    pause = min(distance / 8, 4e-3) if distance > 0 else -distance / 2
    time.sleep(pause if pause > 20e-6 else 0)


class Place:
    """A round's directory in a guest, and what the party holds open: programs/litmus/operations.c in Python."""

    def __init__(self, guest: Guest, directory: str, party: int) -> None:
        self._guest = guest
        self._directory = directory
        self._party = party
        self._handles: dict[str, File] = {}

    def perform(self, name: str, *arguments: str) -> int:
        """Do an operation; a value, or a negative errno."""
        try:
            return _OPERATIONS[name](self, *arguments)
        except OSError as error:
            return error_number(error)

    def leave(self) -> None:
        """Close what is open."""
        for file in self._handles.values():
            file.close()

    def _in(self, name: str) -> str:
        return f"{self._directory}/{name}"

    def _put(self, name: str, content: str, flags: int = 0) -> int:
        with self._guest.open(self._in(name), os.O_WRONLY | flags, 0o644) as file:
            file.write(content.encode())
        return 0

    def create(self, name: str, content: str) -> int:
        return self._put(name, content, os.O_CREAT | os.O_EXCL)

    def write(self, name: str, content: str) -> int:
        return self._put(name, content)

    def overwrite(self, name: str, content: str) -> int:
        return self._put(name, content, os.O_TRUNC)

    def append(self, name: str, content: str) -> int:
        return self._put(name, content, os.O_APPEND)

    def replace(self, name: str, content: str) -> int:
        new = f"{name}.new{self._party}"
        self.create(new, content)
        return self.rename(new, name)

    def increment(self, name: str) -> int:
        return self._increase(name, self.write)

    def increment_by_replace(self, name: str) -> int:
        return self._increase(name, self.replace)

    def _increase(self, name: str, change: Callable[[str, str], int]) -> int:
        number = self.read(name)
        return number if number < 0 else change(name, f"{number + 1:04}")

    def truncate(self, name: str, size: str) -> int:
        self._guest.truncate(self._in(name), int(size))
        return 0

    def read(self, name: str) -> int:
        with self._guest.open(self._in(name)) as file:
            return number_in(file.pread(64, 0))

    def open(self, handle: str, name: str) -> int:
        self._handles[handle] = self._guest.open(self._in(name))
        return 0

    def pread(self, handle: str) -> int:
        return number_in(self._handles[handle].pread(64, 0))

    def held_size(self, handle: str) -> int:
        return self._handles[handle].stat().st_size

    def held_links(self, handle: str) -> int:
        return self._handles[handle].stat().st_nlink

    def exists(self, name: str) -> int:
        return int(self._guest.exists(self._in(name)))

    def _stat(self, name: str) -> os.stat_result:
        return self._guest.stat(self._in(name))

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def links(self, name: str) -> int:
        return self._stat(name).st_nlink

    def mode(self, name: str) -> int:
        return int(f"{stat.S_IMODE(self._stat(name).st_mode):o}")

    def modified(self, name: str) -> int:
        return int(int(self._stat(name).st_mtime) != OLD_MTIME)

    def chmod(self, name: str, mode: str) -> int:
        self._guest.chmod(self._in(name), int(mode, 8))
        return 0

    def symlink(self, target: str, name: str) -> int:
        self._guest.symlink(target, self._in(name))
        return 0

    def target(self, name: str) -> int:
        return int(self._guest.readlink(self._in(name)))

    def mkdir(self, name: str) -> int:
        self._guest.mkdir(self._in(name))
        return 0

    def mkdirs(self, name: str) -> int:
        parts = name.split("/")
        for depth in range(len(parts)):
            try:
                self.mkdir("/".join(parts[: depth + 1]))
            except FileExistsError:
                continue
        return 0

    def rmdir(self, name: str) -> int:
        self._guest.rmdir(self._in(name))
        return 0

    def unlink(self, name: str) -> int:
        self._guest.unlink(self._in(name))
        return 0

    def rename(self, old: str, new: str) -> int:
        self._guest.rename(self._in(old), self._in(new))
        return 0

    def link(self, old: str, new: str) -> int:
        self._guest.link(self._in(old), self._in(new))
        return 0

    def listed(self, directory: str, name: str) -> int:
        return int(name in self._guest.listdir(self._in(directory)))


_OPERATIONS: dict[str, Callable[..., int]] = {
    name.replace("_", "-"): getattr(Place, name)
    for name in vars(Place)
    if not name.startswith("_") and name not in ("perform", "leave")
}
