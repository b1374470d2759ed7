"""What a litmus test is. The tests themselves are in catalogue.py."""

from __future__ import annotations

import dataclasses
import enum
import errno
import itertools
from collections.abc import Iterable, Mapping

UNIX_ONLY = frozenset({"chmod", "mode", "link", "links", "held-links", "symlink", "target"})
"""Operations that a file system without links and modes, as vfat, does not have."""
LOOKS = frozenset(
    {
        "read",
        "open",
        "pread",
        "held-size",
        "held-links",
        "exists",
        "size",
        "links",
        "mode",
        "modified",
        "target",
        "listed",
        "map",
        "load",
        "load-held",
    }
)
"""Operations that change nothing."""
UNSET = "-"
"""The value of a register that its party never came to."""


class Mode(enum.StrEnum):
    """How guests cache.

    AWARE: shared, and they check the version table. MIXED: one domain, each in another way. DAX: shared, and they map
    all files. ISOLATED: shared, but each in a domain of its own, so nobody waits for the leases of another: what would
    be seen if leases did not work, and so which tests would find that.
    """

    NONE = "none"
    AUTO = "auto"
    ALWAYS = "always"
    SHARED = "shared"
    AWARE = "aware"
    MIXED = "mixed"
    DAX = "dax"
    ISOLATED = "isolated"

    @property
    def in_domain(self) -> bool:
        """Whether the backends join a coherence domain."""
        return self in (Mode.SHARED, Mode.AWARE, Mode.MIXED, Mode.DAX, Mode.ISOLATED)

    def cache(self, number: int) -> str:
        """--cache of the backend of guest `number`, from 1."""
        if self is Mode.MIXED:
            return "none" if number == 1 else "shared"
        return "shared" if self.in_domain else self.value

    def aware(self, number: int) -> bool:
        """Whether guest `number` checks the version table, if it is a user-space guest."""
        return self is Mode.AWARE or (self is Mode.MIXED and number == 3)


class Shows(enum.Enum):
    """What a mode does with a test's stale outcomes."""

    NEVER = "never"
    MAY = "may"
    MUST = "must"


@dataclasses.dataclass(frozen=True)
class Party:
    """What one party does in each round.

    Attributes:
        steps: one after the other (programs/litmus/script.h has the forms).
        warm: operations before the round begins, which fill this party's caches.
    """

    steps: tuple[str, ...]
    warm: tuple[str, ...] = ()

    def __init__(self, *steps: str, warm: Iterable[str] = ()) -> None:
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "warm", tuple(warm))

    @property
    def looks_only(self) -> bool:
        """Whether it changes nothing."""
        return all(operation(step) in LOOKS | {"tell", "await"} for step in self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Litmus:
    """A test. An outcome is the values of all registers in order, then those of `final`: "1 0".

    Attributes:
        name: short, as a file name.
        title: what it is about.
        setup: what is there before: "file NAME CONTENT", "dir NAME", "link OLD NEW", "symlink TARGET NAME".
        parties: party 1, 2, and perhaps 3.
        final: operations that the host does at the end, on the directory itself.
        local: the outcomes that a local file system can have.
        stale: more outcomes, that a party can have which uses an old copy. All others are wrong in every mode.
        auto, always: what these modes do with the stale ones; none and shared never have them.
        without_name: party 2 looks at a file that has lost its name. inotify does not tell which file that was, so of
            such a change on the host aware guests learn nothing (docs/concepts/host-watch.md, "Files without a name").
        memory: all that is looked at is the files' memory, which guests with DAX and the host share: no lease counts.
        by_host: whether the host may make the changes.
    """

    name: str
    title: str
    setup: tuple[str, ...]
    parties: tuple[Party, ...]
    final: tuple[str, ...] = ()
    local: frozenset[str]
    stale: frozenset[str]
    auto: Shows
    always: Shows
    without_name: bool = False
    memory: bool = False
    by_host: bool = True

    @property
    def registers(self) -> int:
        """How many registers the parties have together."""
        steps = itertools.chain.from_iterable(party.steps for party in self.parties)
        return sum("=" in step.split() for step in steps)

    @property
    def needs_links(self) -> bool:
        """Whether it needs a file system with links and modes."""
        steps = itertools.chain(self.setup, self.final, *(party.warm + party.steps for party in self.parties))
        return any(operation(step) in UNIX_ONLY for step in steps)

    @property
    def one_changes(self) -> bool:
        """Whether party 1 makes all changes, and party 2, the only other, looks."""
        return len(self.parties) == 2 and not self.parties[0].looks_only and self.parties[1].looks_only

    @property
    def told(self) -> bool:
        """Whether party 2 looks only after it was told that the changes are done."""
        return self.one_changes and self.parties[1].steps[0] == "await 1"

    def shows(self, mode: Mode) -> Shows:
        """What guests in a mode do with the stale outcomes, when all changes come from guests."""
        if mode is Mode.ISOLATED:
            # Leases on what was just made are short: none may be left.
            return Shows.MAY
        return {Mode.AUTO: self.auto, Mode.ALWAYS: self.always}.get(mode, Shows.NEVER)


def operation(step: str) -> str:
    """The name of a step's operation, or "tell" or "await"."""
    words = step.split()
    if "=" in words:
        words = words[2:]
    return words[2] if words[0] == "until" else words[0]


def shown(value: int | None) -> str:
    """A register's value as outcomes have it: a number, the name of an error, or UNSET."""
    if value is None:
        return UNSET
    return str(value) if value >= 0 else errno.errorcode.get(-value, str(value))


def number_in(content: bytes) -> int:
    """What a register has of a file's content."""
    if not content:
        return -errno.ENODATA
    return int(content) if content.isdigit() else -errno.EILSEQ


def each(*values: Iterable[int | str]) -> frozenset[str]:
    """The outcomes in which each register has any of its values."""
    return frozenset(" ".join(map(str, row)) for row in itertools.product(*values))


def problems(test: Litmus, shows: Shows, seen: Mapping[str, int]) -> list[str]:
    """What is wrong with the outcomes that were seen; empty: nothing.

    Args:
        test: the test.
        shows: what is expected of its stale outcomes here.
        seen: how often each outcome was seen.
    """
    allowed = test.local if shows is Shows.NEVER else test.local | test.stale
    found = [
        f"{test.name}: forbidden outcome {outcome!r}, {n} times"
        for outcome, n in seen.items()
        if outcome not in allowed
    ]
    if shows is Shows.MUST and not any(outcome in test.stale for outcome in seen):
        found.append(f"{test.name}: no stale outcome was seen, so it proves nothing elsewhere: {dict(seen)}")
    return found
