"""Measure backends in real guests, alternating, guest and backend pinned to one processor."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.lab import assets, backends
from tests.lab.backends import Backend
from tests.lab.guest import Guest, boot

PROGRAM = Path(__file__).with_name("latency.c")
WARM_UP = 0.1
"""Part of an operation's repetitions that is run before it is measured."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the comparison.

    Attributes:
        title: Name for people.
        name: Name for latency.c.
        count: Repetitions a round.
        cache: Cache mode of the backend, by our name.
    """

    title: str
    name: str
    count: int
    cache: str = "none"


OPERATIONS = (
    Operation("stat", "stat", 2000),
    Operation("open+close", "open", 1500),
    Operation("pread 4k", "pread", 8000),
    Operation("pwrite 4k", "pwrite", 8000),
    Operation("create+unlink", "create", 800),
    Operation("list 1000 entries", "list", 60),
    # No backend offers READDIRPLUS where nothing may be cached.
    Operation("list and stat 1000 entries, cold, cache=auto", "list-stat", 20, "auto"),
    Operation("sequential read 1 MiB", "read-big", 400),
    Operation("sequential write 1 MiB", "write-big", 400),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one operation costs: latency in the guest and processor time of the backend, in microseconds."""

    latency: float
    cpu: float


Serve = Callable[..., contextlib.AbstractContextManager[Backend]]
PEERS: dict[str, Serve] = {"ours": backends.ours, "rust": backends.rust, "c": backends.c}


def compare(
    names: Sequence[str],
    *,
    kind: str,
    boots: int,
    rounds: int,
    cpu: str,
    operations: Sequence[Operation],
    say: Callable[[str], None],
) -> dict[str, dict[str, Cost]]:
    """Measure backends side by side.

    Args:
        names: Keys of PEERS.
        kind: Of the guests, "uml" or "qemu".
        boots: How often the guests and backends are started anew.
        rounds: How often each backend is measured after each boot; the results are medians over all rounds.
        cpu: The processor that guests and backends share.
        operations: What to measure.
        say: Receives progress lines.

    Returns:
        For each backend, for each operation's title, its cost.
    """
    samples: dict[tuple[str, str], list[Cost]] = {}
    caches = sorted({operation.cache for operation in operations})
    for boot_number in range(boots):
        # New guests: where the host paths their memory makes a difference of a fifth in long transfers.
        with contextlib.ExitStack() as stack:
            subjects = {name: stack.enter_context(_subject(name, kind, cpu, caches)) for name in names}
            for operation in operations:
                for subject in subjects.values():
                    subject.measure(operation, max(20, int(operation.count * WARM_UP)))
            for round_number in range(rounds):
                say(f"boot {boot_number + 1} of {boots}, round {round_number + 1} of {rounds}")
                # Another one begins in each round, so that none is always the first.
                begin = (boot_number * rounds + round_number) % len(names)
                for operation in operations:
                    for name in [*names[begin:], *names[:begin]]:
                        cost = subjects[name].measure(operation, operation.count)
                        samples.setdefault((name, operation.title), []).append(cost)
    return {
        name: {operation.title: _median(samples[name, operation.title]) for operation in operations} for name in names
    }


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A guest and its backends, one for each cache mode; they share one directory, mounted at /MODE."""

    guest: Guest
    backends: Mapping[str, Backend]

    def measure(self, operation: Operation, count: int) -> Cost:
        backend = self.backends[operation.cache]
        before = backend.cpu_seconds()
        command = f"/latency {operation.name} /{operation.cache} {count}"
        nanoseconds = float(self.guest.check(command, timeout=300))
        cpu = backend.cpu_seconds() - before
        return Cost(latency=nanoseconds / 1e3, cpu=cpu / count * 1e6)


@contextlib.contextmanager
def _subject(name: str, kind: str, cpu: str, caches: Sequence[str]) -> Iterator[_Subject]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"compare-{name}-")))
        share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", dir="/dev/shm")))
        served: dict[str, Backend] = {}
        sockets: dict[str, Path] = {}
        for cache in caches:
            mode = "never" if (name, cache) == ("rust", "none") else cache
            served[cache] = stack.enter_context(PEERS[name](share, folder, cache=mode, tag=cache, cpu_list=cpu))
            front = served[cache]
            if kind == "uml" and name != "ours":
                front = stack.enter_context(backends.for_uml(front, tag=cache if name == "c" else None))
            sockets[cache] = front.socket
        guest = stack.enter_context(boot(kind, shares=sockets, cpu_list=cpu))
        for cache in caches:
            guest.mount(cache, f"/{cache}")
        guest.put_file("/latency", assets.compile_static(PROGRAM).read_bytes())
        guest.check(f"/latency prepare /{caches[0]} 0", timeout=120)
        yield _Subject(guest, served)


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(cost.latency for cost in costs), statistics.median(cost.cpu for cost in costs))
