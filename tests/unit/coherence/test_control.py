"""What coherencectl watch and top print."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.ctl import main as ctl
from coherent_vfs.coherence.ctl import top, watch
from coherent_vfs.coherence.ctl.client import Report
from coherent_vfs.coherence.protocol.messages import Backend, Change, Changes, DaxUse, Status, Watching

NOON = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, 0))


def test_a_change_is_a_line() -> None:
    changes = Changes(
        [Change(NOON + 0.25, "red", "modify", b"/srv/f", 12), Change(NOON, "host", "move from", b"/srv/g", 1)], 3
    )
    assert watch.lines(changes) == [
        "12:00:00.250  red           modify     /srv/f (x12)",
        "12:00:00.000  host          move from  /srv/g",
        "3 changes not shown: they came faster than they could be printed",
    ]
    assert [json.loads(line) for line in watch.json_lines(changes)] == [
        {"time": NOON + 0.25, "who": "red", "what": "modify", "path": "/srv/f", "times": 12},
        {"time": NOON, "who": "host", "what": "move from", "path": "/srv/g", "times": 1},
        {"missed": 3},
    ]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/é/日".encode(), "/é/日"),
        (b"/\x1b[2Jhidden\n\r", "/\\x1b[2Jhidden\\n\\r"),
        (b"/\xff\xfe", "/\\xff\\xfe"),
        ("/\u202egnp.exe\x9b".encode(), "/\\u202egnp.exe\\x9b"),
    ],
)
def test_no_name_does_anything_to_a_terminal(path: bytes, shown: str) -> None:
    assert watch.printable(path) == shown
    (line,) = watch.json_lines(Changes([Change(1.0, "host", "create", path, 1)], 0))
    assert json.loads(line)["path"] == path.decode("utf-8", "backslashreplace")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a path of 5002 bytes"):
        next(watch.follow(tmp_path / "s", Path("/" + "x/" * 2500 + "y")))


def status(sequence: int, bumped: int, raises: int = 1) -> Status:
    return Status(
        table="/dev/shm/vt",
        domain="00",
        pid=1,
        seconds=1.0,
        slots=1024,
        sequence=sequence,
        floor=0,
        trusted=True,
        removed=False,
        roots=1,
        missing=[],
        outside=[],
        bumps_per_second=0.0,
        floor_raises={"mount": raises},
        distrusts=1,
        watch=Watching("inotify", 7, 10, 3, 1, 30, bumped, 10, 0),
        dax=DaxUse(2, 128 << 30, 64 << 30, 7, 14 << 20, 256 << 30, 3, 5),
    )


def backend(pid: int, guest: str, **counters: int) -> Backend:
    return Backend(pid, guest, "shared", 1, 2, 1.0, counters or None)


def test_rates_are_differences() -> None:
    old = Report(status(100, 10), [backend(5, "red", requests=100, changes=1, held=0, leases=7, aware=1, parked=0)])
    new = Report(
        status(300, 14, raises=2),
        [backend(5, "red", requests=300, changes=5, held=2, leases=7, aware=1, parked=3, inodes=9, handles=4)],
    )
    view = top.compare(old, new, 2.0)
    assert (view.domain.bumps_per_second, view.domain.host_changes_per_second) == (100, 2)
    assert (view.domain.floor_raises, view.domain.new_floor_raises) == (2, 1)
    assert view.guests == [top.GuestRow("red", "shared", 5, "aware", 100, 2, 1, 3, 0, 9, 4)]
    *head, columns, row = top.lines(view)
    assert head[0].endswith("/dev/shm/vt, trusted, the last 2.0 s")
    assert head[1] == "bumps/s 100.0, host changes/s 2.0, floor raised 2 times (+1)"
    assert head[2] == "watches 7 of 10, 3 refused, 1 overflows"
    assert tuple(columns.split()) == top.COLUMNS
    assert row.split() == ["red", "shared", "aware", "100.0", "2.0", "1.0", "3", "0.0", "9", "4", "5"]


def test_what_is_not_known_is_not_shown_as_nothing() -> None:
    old = Report(status(1, 1), [backend(5, "red")])
    new = Report(
        status(1, 1), [backend(5, "red", requests=3, aware=0), backend(6, "blue"), backend(7, "new", parked=1)]
    )
    rows = {row.guest: row for row in top.compare(old, new, 1.0).guests}
    assert (rows["red"].requests_per_second, rows["red"].kind) == (None, "stock")
    assert (rows["blue"].parked, rows["blue"].kind) == (None, None)
    assert (rows["new"].parked, rows["new"].changes_per_second) == (1, None)
    assert top.lines(top.compare(old, new, 1.0))[-1].split()[2:-1] == ["stock"] + 7 * ["-"]


def test_counters_of_what_was_started_again_go_on_from_nothing() -> None:
    old = Report(status(1000, 500), [backend(5, "red", requests=50)])
    new = Report(status(10, 4), [backend(5, "red", requests=2)])
    view = top.compare(old, new, 2.0)
    assert (view.domain.bumps_per_second, view.domain.host_changes_per_second) == (5, 2)
    assert view.guests[0].requests_per_second == 1


def test_who_changes_most_comes_first() -> None:
    names = ["quiet", "reader", "writer"]
    old = Report(status(1, 1), [backend(5, name, requests=0, changes=0) for name in names])
    rates = {"quiet": (0, 0), "reader": (900, 0), "writer": (5, 4)}
    new = Report(status(1, 1), [backend(5, n, requests=r, changes=c) for n, (r, c) in rates.items()])
    assert [row.guest for row in top.compare(old, new, 1.0).guests] == ["writer", "reader", "quiet"]


def test_more_guests_than_lines() -> None:
    report = Report(status(1, 1), [backend(5, f"g{number:02}", requests=1) for number in range(40)])
    view = top.compare(report, report, 1.0)
    assert len(top.lines(view)) == 45
    shown = top.lines(view, 24)
    assert len(shown) == 24
    assert shown[-1] == "and 22 more"
    assert top.lines(view, 45) == top.lines(view)


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon", "99999"])
def test_a_wrong_interval(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ctl.main(["top", f"--interval={interval}"])
    assert caught.value.code == 2
    assert "use 0.1 to 3600 seconds" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["watch", "top"])
def test_no_daemon(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main([command, "--socket", str(tmp_path / "s")]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "no coherenced at" in output.err


def test_help_says_what_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ctl.main(["watch", "--help"])
    assert "Only what happens in directories that coherenced watches is shown" in capsys.readouterr().out
