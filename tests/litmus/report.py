"""What was seen: tables for people, a summary for docs/development/litmus.md, and all of it for docs/data/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.litmus.arrangement import Arrangement, Played
from tests.litmus.litmus import Litmus, Mode, Shows
from tests.litmus.run import Outcomes

Results = Mapping[str, Sequence[Played]]
"""For each kind of guests."""
Groups = Mapping[str, Sequence[Litmus]]
"""Tests by a title."""
SIGNS = {Shows.NEVER: "", Shows.MAY: "~", Shows.MUST: "!"}


def account(title: str, runs: Mapping[str, str], results: Results, groups: Groups) -> str:
    """All that was seen, test by test.

    Args:
        title: of its headings.
        runs: when each kind of guests was played, for people.
        results: what was seen.
        groups: the tests that it is about.
    """
    return "\n".join(
        [
            f"## {title}: what was seen\n",
            *(f"- {kind}: {text}" for kind, text in runs.items()),
            "",
            *_summaries(results),
            f"## {title}: the tests\n",
            *_tests(results, groups),
        ]
    )


def summary(runs: Mapping[str, str], results: Results) -> str:
    """How many judged rounds were stale, all tests together; the arguments are those of account()."""
    columns = [mode for mode in Mode if any(one.mode is mode for played in results.values() for one in played)]
    rows = []
    for kind, played in results.items():
        for arrangement in Arrangement:
            cells = {one.mode: _stale_of_judged(one) for one in played if one.arrangement is arrangement}
            if cells:
                rows.append([kind, arrangement.value, *(cells.get(mode, "") for mode in columns)])
    told = "".join(f"- {kind}: {text}.\n" for kind, text in runs.items())
    return "\n".join([told, *_table(["guests", "who takes part", *(mode.value for mode in columns)], rows)])


def data(title: str, runs: Mapping[str, str], results: Results) -> dict[str, Any]:
    """The same as account(), for programs: of each test stale and disturbed rounds, and the outcomes of guests."""
    played = [(kind, one) for kind, each in results.items() for one in each]
    return {
        "title": title,
        "runs": dict(runs),
        "results": [
            {
                "guests": kind,
                "arrangement": one.arrangement.value,
                "mode": one.mode.value,
                "rounds_of_each": _rounds(one),
                "stale_and_disturbed": {
                    test.name: [_stale(test, one), one.seen[test.name].disturbed.total()] for test in one.tests
                },
            }
            for kind, one in played
        ],
        "outcomes": {
            test.name: {mode.value: dict(seen.judged) for mode in Mode if (seen := _seen(test, mode, results)).judged}
            for test in dict.fromkeys(test for _, one in played for test in one.tests)
        },
    }


def _stale(test: Litmus, one: Played) -> int:
    return sum(n for outcome, n in one.seen[test.name].judged.items() if outcome in test.stale)


def _stale_of_judged(one: Played) -> str:
    judged = sum(outcomes.judged.total() for outcomes in one.seen.values())
    return f"{sum(_stale(test, one) for test in one.tests):,} of {judged:,}"


def _summaries(results: Results) -> Iterable[str]:
    for kind, played in results.items():
        for arrangement in Arrangement:
            columns = [one for one in played if one.arrangement is arrangement]
            if not columns:
                continue
            yield f"### {kind}: {arrangement.value}\n"
            yield from _table(
                ["test", *(one.mode.value for one in columns)],
                [
                    ["*rounds of each*", *(_rounds(one) for one in columns)],
                    *([f"`{test.name}`", *(_summary(test, one) for one in columns)] for test in columns[0].tests),
                ],
            )


def _rounds(one: Played) -> str:
    counts = {outcomes.rounds for outcomes in one.seen.values()}
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _summary(test: Litmus, one: Played) -> str:
    """Stale rounds, the sign of what is expected, disturbed rounds, and forbidden ones loudly."""
    seen = one.seen[test.name]
    shows = one.arrangement.shows(test, one.mode)
    stale = _stale(test, one)
    wrong = sum(n for outcome, n in seen.judged.items() if outcome not in test.local | test.stale)
    words = [f"{stale}{SIGNS[shows]}"]
    if shows is Shows.NEVER and stale:
        words.append(f"**{stale} forbidden**")
    if wrong:
        words.append(f"**{wrong} wrong**")
    if disturbed := seen.disturbed.total():
        words.append(f"({disturbed})")
    return " ".join(words)


def _tests(results: Results, groups: Groups) -> Iterable[str]:
    for group, tests in groups.items():
        yield f"### {group}\n"
        for test in tests:
            yield from _test(test, results)


def _test(test: Litmus, results: Results) -> Iterable[str]:
    yield f"**`{test.name}`**: {test.title}.\n"
    yield "```"
    yield from (f"before   {line}" for line in test.setup)
    for number, party in enumerate(test.parties, start=1):
        warm = f"   (kept: {'; '.join(party.warm)})" if party.warm else ""
        yield f"party {number}  {'; '.join(party.steps)}{warm}"
    if test.final:
        yield f"at last  {'; '.join(test.final)}"
    yield "```\n"
    seen = {mode: _seen(test, mode, results) for mode in Mode}
    modes = [mode for mode in Mode if seen[mode].judged]
    outcomes = sorted(
        set().union(*(seen[mode].judged for mode in modes)), key=lambda outcome: (outcome not in test.local, outcome)
    )
    if outcomes:
        yield from _table(
            ["outcome", "", *(mode.value for mode in modes)],
            [
                *([f"`{o}`", _class(test, o), *(str(seen[mode].judged[o] or "") for mode in modes)] for o in outcomes),
                ["*a change waited*", "", *(str(seen[mode].waited or "") for mode in modes)],
            ],
        )


def _class(test: Litmus, outcome: str) -> str:
    return "local" if outcome in test.local else "stale" if outcome in test.stale else "**wrong**"


def _seen(test: Litmus, mode: Mode, results: Results) -> Outcomes:
    total = Outcomes()
    for played in results.values():
        for one in played:
            if one.arrangement is Arrangement.GUESTS and one.mode is mode and test.name in one.seen:
                total.add(one.seen[test.name])
    return total


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
