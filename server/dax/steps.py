"""Work in several steps, of which each waits for an answer: written as a generator, run by callbacks.

A generator yields functions; each is called with a callback, whose arguments are what the yield gives, as a tuple.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

Call = Callable[[Callable[..., None]], object]
Steps = Generator[Call, tuple[Any, ...], None]


def run(steps: Steps, finished: Callable[[], None] = lambda: None) -> None:
    """Begin the work; it goes on whenever an answer comes, and calls `finished` at its end."""
    answers: deque[tuple[Any, ...]] = deque()
    running = True

    def go_on() -> None:
        nonlocal running
        try:
            # An answer may come before the function that asks for it has returned.
            while answers:
                steps.send(answers.popleft())(resume)
        except StopIteration:
            finished()
        finally:
            running = False

    def resume(*answer: Any) -> None:
        nonlocal running
        answers.append(answer)
        if not running:
            running = True
            go_on()

    try:
        next(steps)(resume)
    except StopIteration:
        finished()
        return
    go_on()


def together(calls: Sequence[Call]) -> Call:
    """What asks all of these at once, in their order; it gives a list of their answers, one argument each."""

    def ask(callback: Callable[..., None]) -> None:
        answers: dict[int, Any] = {}

        def answered(number: int, answer: Any) -> None:
            answers[number] = answer
            if len(answers) == len(calls):
                callback([answers[each] for each in range(len(calls))])

        for number, call in enumerate(calls):
            call(partial(answered, number))
        if not calls:
            callback([])

    return ask


class Line:
    """Works that are done one after the other."""

    def __init__(self) -> None:
        self._waiting: deque[Steps] = deque()
        self._busy = False
        self._going_on = False

    def add(self, steps: Steps) -> None:
        """Do this when everything before it is done."""
        self._waiting.append(steps)
        self._go_on()

    def _go_on(self) -> None:
        # Not by recursion: any number of works may be done at once.
        if self._going_on:
            return
        self._going_on = True
        try:
            while self._waiting and not self._busy:
                self._busy = True
                run(self._waiting.popleft(), self._finished)
        finally:
            self._going_on = False

    def _finished(self) -> None:
        self._busy = False
        self._go_on()
