"""Coroutines that callbacks run further: the event loop of a back-end, server.device.event_loop, is not asyncio's.

`start` runs a coroutine until it awaits a Future that has no result yet. Whoever sets the result, from a callback of
the event loop, runs it further; there is no scheduler. An exception of a coroutine goes to who started it or set the
result, as from any other callback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Work = Coroutine["Future[Any]", None, None]


class Future(Generic[T]):
    """A result that comes later; one coroutine may await it."""

    def __init__(self) -> None:
        self._results: list[T] = []
        self._awaiting: Work | None = None

    def set_result(self, result: T) -> None:
        """Set it, once; runs the coroutine that awaits it."""
        self._results.append(result)
        if self._awaiting is not None:
            start(self._awaiting)

    def resume(self, work: Work) -> None:
        """Run this coroutine further when the result is set."""
        self._awaiting = work

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self._results:
            yield self
        return self._results[0]


def start(work: Work) -> None:
    """Run a coroutine until it has to wait; its Future runs it further."""
    try:
        future = work.send(None)
    except StopIteration:
        return
    future.resume(work)


async def wait_for_all(futures: Iterable[Future[T]]) -> None:
    """Until each has its result."""
    for future in futures:
        await future


class Line:
    """Coroutines that run one after the other."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], Work]] = deque()
        self._busy = False

    def add(self, work: Callable[P, Work], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run `work(*args, **kwargs)` when everything before it has ended."""
        # Called in its turn: Python warns of a coroutine that was made and never ran, as at the end of the process.
        self._waiting.append(partial(work, *args, **kwargs))
        if not self._busy:
            start(self._run())

    async def _run(self) -> None:
        self._busy = True
        try:
            while self._waiting:
                await self._waiting.popleft()()
        finally:
            self._busy = False
