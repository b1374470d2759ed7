"""find and git status on a large tree, and what they miss after the other guest's changes."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.modes.loops import turned
from bench.modes.stage import AUTO, SHARED, Mode, Stage
from tests.lab.paths import LabError

RESERVE = 500
"""Descriptors that a backend needs for all but the tree's files."""
FEW = 1_000
"""Files of the tree in which staleness is counted: a look at it is shorter than what `auto` may cache, 1 s."""
CHANGED = 20
"""Files that the other guest changes between two looks."""
MODES = (SHARED, AUTO)
TOOLS = {
    "find -name": "find /run/{mode}/{tree} -name '*nothing*' -not -path '*/.git/*'",
    "find -size": "find /run/{mode}/{tree} -size +100k -not -path '*/.git/*'",
    "git status": "git -c safe.directory='*' -C /run/{mode}/{tree} --no-optional-locks status --porcelain",
}
SHOW_SIZES = ("find -size", "git status")
"""Tools that show that a file has another size."""


@dataclasses.dataclass(frozen=True)
class Walks:
    """Seconds for a walk over the tree; cold: after the guest forgot names and inodes."""

    cold: Sequence[float]
    warm: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Missed:
    """Of so many files changed by the other guest and acknowledged, so many were shown as before."""

    changed: int
    stale: int


@dataclasses.dataclass(frozen=True)
class TreeResults:
    walks: Mapping[tuple[str, Mode], Walks]
    missed: Mapping[tuple[str, Mode], Missed]


def prepare(stage: Stage, files: int) -> None:
    """Make the trees, a large one of so many files; they have to age before they are measured.

    Raises:
        LabError: The Rust virtiofsd, which has open each inode that its guest knows, may not open so many.
    """
    if files > (most := resource.getrlimit(resource.RLIMIT_NOFILE)[1] - RESERVE):
        raise LabError(f"--files {files}: the limit of open files (ulimit -Hn) permits {most}")
    _repository(stage.share / "tree", files)
    for mode in MODES:
        _repository(stage.share / f"few-{mode.name}", FEW)


def measure(stage: Stage, rounds: int) -> TreeResults:
    """Measure all, alternating.

    Args:
        stage: Where prepare was called, and then age.
        rounds: How often; in each one cold walk and one warm one, and a count of what is missed.
    """
    walks: dict[tuple[str, Mode], Walks] = {}
    missed: dict[tuple[str, Mode], Missed] = {}
    for number in range(rounds):
        for tool in TOOLS:
            stage.say(f"round {number + 1} of {rounds}: {tool}")
            for mode in turned(MODES, number):
                stage.drop_names()
                cold, warm = (_walk(stage, tool, mode) for _ in range(2))
                earlier = walks.get((tool, mode), Walks((), ()))
                walks[tool, mode] = Walks((*earlier.cold, cold), (*earlier.warm, warm))
            if tool not in SHOW_SIZES:
                continue
            stage.drop_names()
            for mode in MODES:
                before = missed.get((tool, mode), Missed(0, 0))
                found = _miss(stage, tool, mode, number * len(TOOLS) + list(TOOLS).index(tool))
                missed[tool, mode] = Missed(before.changed + found.changed, before.stale + found.stale)
    return TreeResults(walks, missed)


def _repository(place: Path, files: int) -> None:
    """A git work tree of small files, 100 in a folder, with all objects in one pack."""
    for number in range(files):
        folder = place / f"{number // 1000:02d}" / f"{number // 100 % 10}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"file-{number:05d}").write_text(f"{number}\n" * (number % 50))
    identity = ["-c", "user.name=Lab", "-c", "user.email=lab@example.org", "-c", "gc.auto=0"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"], ["repack", "-adq"]):
        subprocess.run(["git", "-C", place, *identity, *words], check=True, capture_output=True)
    # Files as young as the index would be read to be compared (git's "racy" entries); this writes it once more.
    time.sleep(1.1)
    subprocess.run(["git", "-C", place, "update-index", "-q", "--really-refresh"], check=True)
    subprocess.run(["git", "-C", place, "status", "--porcelain"], check=True, capture_output=True)


def _walk(stage: Stage, tool: str, mode: Mode) -> float:
    command = TOOLS[tool].format(mode=mode.name, tree="tree")
    timed = f"a=$(date +%s%N); {command} >/run/found; b=$(date +%s%N); echo $((b - a)); test ! -s /run/found"
    return int(stage.looker.check(timed, timeout=300)) / 1e9


def _miss(stage: Stage, tool: str, mode: Mode, turn: int) -> Missed:
    """Look, let the other guest change some files, and look again: what is not shown now is stale."""
    tree = f"few-{mode.name}"
    look = TOOLS[tool].format(mode=mode.name, tree=tree)
    first = turn * CHANGED
    names = [f"{number // 1000:02d}/{number // 100 % 10}/file-{number:05d}" for number in range(first, first + CHANGED)]
    stage.looker.check(look, timeout=60)
    stage.other.check(f"cd /run/{mode.name}/{tree} && truncate -s 200K {' '.join(names)}", timeout=60)
    shown = stage.looker.check(look, timeout=60).decode()
    return Missed(len(names), sum(name not in shown for name in names))
