"""Measure backends in real guests, alternating, guest and backend pinned to one processor."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.lab import assets, backends
from tests.lab.backends import Backend
from tests.lab.guest import Guest, boot

PROGRAM = Path(__file__).with_name("latency.c")
WARM_UP = 0.1
"""Part of an operation's repetitions that is run before it is measured."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the comparison: name for people, name for latency.c, repetitions a round."""

    title: str
    name: str
    count: int


OPERATIONS = (
    Operation("stat", "stat", 2000),
    Operation("open+close", "open", 1500),
    Operation("pread 4k", "pread", 8000),
    Operation("pwrite 4k", "pwrite", 8000),
    Operation("create+unlink", "create", 800),
    Operation("readdirplus of 1000 entries", "list", 60),
    Operation("sequential read 1 MiB", "read-big", 192),
    Operation("sequential write 1 MiB", "write-big", 192),
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
    rounds: int,
    cpu: str,
    operations: Sequence[Operation],
    say: Callable[[str], None],
) -> dict[str, dict[str, Cost]]:
    """Measure backends side by side.

    Args:
        names: Keys of PEERS.
        kind: Of the guests, "uml" or "qemu".
        rounds: Each backend is measured once in each, in a new guest; the results are medians over them.
        cpu: The processor that guests and backends share.
        operations: What to measure.
        say: Receives progress lines.

    Returns:
        For each backend, for each operation's title, its cost.
    """
    samples: dict[tuple[str, str], list[Cost]] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        # Another one begins in each round, so that none is always the first.
        order = [*names[number % len(names) :], *names[: number % len(names)]]
        # New guests in each round: where the host places their memory makes a difference of a fifth in long transfers.
        with contextlib.ExitStack() as stack:
            pairs = {name: stack.enter_context(_guest(name, kind, cpu)) for name in order}
            for operation in operations:
                for guest, backend in pairs.values():
                    _measure(guest, backend, operation, max(20, int(operation.count * WARM_UP)))
                for name, (guest, backend) in pairs.items():
                    cost = _measure(guest, backend, operation, operation.count)
                    samples.setdefault((name, operation.title), []).append(cost)
    return {
        name: {operation.title: _median(samples[name, operation.title]) for operation in operations} for name in names
    }


@contextlib.contextmanager
def _guest(name: str, kind: str, cpu: str) -> Iterator[tuple[Guest, Backend]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"compare-{name}-")))
        share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", dir="/dev/shm")))
        cache = "never" if name == "rust" else "none"
        backend = stack.enter_context(PEERS[name](share, folder, cache=cache, tag="share", cpu_list=cpu))
        front = backend
        if kind == "uml" and name != "ours":
            front = stack.enter_context(backends.for_uml(backend, tag="share" if name == "c" else None))
        guest = stack.enter_context(boot(kind, shares={"share": front.socket}, cpu_list=cpu))
        guest.mount("share", "/mnt")
        guest.put_file("/latency", assets.compile_static(PROGRAM).read_bytes())
        guest.check("/latency prepare /mnt 0", timeout=120)
        yield guest, backend


def _measure(guest: Guest, backend: Backend, operation: Operation, count: int) -> Cost:
    before = backend.cpu_seconds()
    nanoseconds = float(guest.check(f"/latency {operation.name} /mnt {count}", timeout=300))
    cpu = backend.cpu_seconds() - before
    return Cost(latency=nanoseconds / 1e3, cpu=cpu / count * 1e6)


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(cost.latency for cost in costs), statistics.median(cost.cpu for cost in costs))
