"""What happens in the demo, and how it is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from demo.viewers import Viewer

PATIENCE = 3.0
"""Seconds after which somebody who still sees the old state is said not to see the change."""
LOOKS = 100


@dataclass(frozen=True)
class Stage:
    """One cache mode with all who take part.

    Attributes:
        mode: as the account calls it.
        first, second, host: the two guests and the host.
        requests: how many requests of the second guest its backend has served.
    """

    mode: str
    first: Viewer
    second: Viewer
    host: Viewer
    requests: Callable[[], int]


def perform(stage: Stage, say: Callable[[str], None]) -> None:
    """Play all scenes of a mode and say line by line what was seen."""
    first, second, host = stage.first, stage.second, stage.host
    say(f"\ncache={stage.mode}")
    first.write("file", "as it was")
    second.look("quiet", 1)
    before = stage.requests()
    second.look("quiet", LOOKS)
    _tell(say, f"nothing changes, {second.name} looks {LOOKS} times", f"{stage.requests() - before} requests")

    _change(
        say,
        first,
        "writes a file",
        (second,),
        "file",
        lambda: first.write("file", "by the first"),
        "by the first",
    )
    _change(
        say,
        second,
        "writes it again",
        (first,),
        "file",
        lambda: second.write("file", "by the second"),
        "by the second",
    )
    _change(say, first, "creates a file", (second,), "new", lambda: first.write("new", "born"), "born")
    _change(say, second, "removes it", (first,), "new", lambda: second.remove("new"), None)
    _change(
        say,
        host,
        "writes a file",
        (first, second),
        "file",
        lambda: host.write("file", "by the host itself"),
        "by the host itself",
    )
    host.remove("file")


def _change(
    say: Callable[[str], None],
    who: Viewer,
    does: str,
    watchers: tuple[Viewer, ...],
    file: str,
    change: Callable[[], None],
    outcome: str | None,
) -> None:
    """Let the watchers see the old state, so that they could keep it; change it; see when they know."""
    for watcher in watchers:
        watcher.read(file)
    began = time.monotonic()
    change()
    acknowledged = time.monotonic()
    seen: dict[str, float] = {}
    while len(seen) < len(watchers) and time.monotonic() - acknowledged < PATIENCE:
        for watcher in watchers:
            if watcher.name not in seen:
                asked = time.monotonic() - acknowledged
                if watcher.read(file) == outcome:
                    # The answer is as old as the question.
                    seen[watcher.name] = asked
    told = [
        f"{watcher.name} sees it "
        + (f"after {seen[watcher.name]:.2f} s" if seen.get(watcher.name, 0) > 0.2 else "at once")
        if watcher.name in seen
        else f"{watcher.name} DOES NOT SEE IT within {PATIENCE:.0f} s"
        for watcher in watchers
    ]
    waited = acknowledged - began
    _tell(
        say, f"{who.name} {does}", ", ".join(told) + (f" (acknowledged after {waited:.2f} s)" if waited > 0.2 else "")
    )


def _tell(say: Callable[[str], None], what: str, outcome: str) -> None:
    say(f"  {what:<46} {outcome}")
