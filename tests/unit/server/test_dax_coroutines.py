"""The coroutines of the DAX window: when they run, and where their exceptions go."""

from __future__ import annotations

import sys

import pytest

from coherent_vfs.server.dax.coroutines import Future, Line, start, wait_for_all


async def note(log: list[object], future: Future[int]) -> None:
    log.append(await future)


def test_a_coroutine_goes_on_where_the_result_is_set() -> None:
    log: list[object] = []
    late: Future[int] = Future()
    early: Future[int] = Future()
    early.set_result(1)
    start(note(log, late))
    start(note(log, early))
    assert log == [1]
    late.set_result(2)
    assert log == [1, 2]


def test_all_are_waited_for_in_any_order() -> None:
    log: list[object] = []
    futures: list[Future[int]] = [Future() for _ in range(3)]

    async def wait() -> None:
        await wait_for_all(futures)
        log.append("all")

    start(wait())
    for number in (1, 0, 2):
        assert not log
        futures[number].set_result(number)
    assert log == ["all"]


def test_a_line_runs_one_after_the_other() -> None:
    log: list[object] = []
    line = Line()
    first: Future[int] = Future()
    second: Future[int] = Future()
    second.set_result(2)
    line.add(note, log, first)
    line.add(note, log, second)
    assert log == []
    first.set_result(1)
    assert log == [1, 2]


def test_a_line_of_any_length_does_not_recurse() -> None:
    log: list[object] = []
    line = Line()
    futures: list[Future[int]] = [Future() for _ in range(2 * sys.getrecursionlimit())]
    for future in futures:
        line.add(note, log, future)
    for future in reversed(futures):
        future.set_result(0)
    assert len(log) == len(futures)


def test_an_exception_goes_to_who_set_the_result_and_does_not_stop_the_line() -> None:
    log: list[object] = []
    line = Line()
    answer: Future[int] = Future()

    async def fail() -> None:
        await answer
        raise RuntimeError("lost")

    line.add(fail)
    with pytest.raises(RuntimeError, match="lost"):
        answer.set_result(0)
    with pytest.raises(RuntimeError, match="lost"):
        line.add(fail)
    line.add(note, log, answer)
    assert log == [0]
