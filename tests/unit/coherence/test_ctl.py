"""coherencectl without a good daemon or table; with them it is in tests/integration."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from coherent_vfs.coherence.ctl import client
from coherent_vfs.coherence.ctl import main as ctl
from coherent_vfs.coherence.ctl.status import render
from coherent_vfs.coherence.protocol.messages import Backend, DaxUse, Status, Watching
from coherent_vfs.coherence.shm.paths import DomainPaths
from coherent_vfs.coherence.shm.table import TRUST_NOTHING, Table


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Its one line of complaint."""
    assert ctl.main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def overwrite(paths: DomainPaths, word: int, value: int) -> None:
    with paths.table.open("r+b") as file:
        file.seek(8 * word)
        file.write(struct.pack("<Q", value))


def test_a_sound_table(table: Table, paths: DomainPaths, capsys: pytest.CaptureFixture[str]) -> None:
    table.bump(5)
    assert ctl.main(["check", str(paths.table)]) == 0
    assert ctl.main(["check", paths.name]) == 0
    table.distrust()
    assert ctl.main(["check", str(paths.table)]) == 0
    assert (
        capsys.readouterr().out.count(f"sound: ABI 2, 1048576 slots, sequence 2, 0 roots, domain {table.domain.hex()}")
        == 3
    )


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        (0, 1, "not a version table"),
        (512 + 3, 99, "1 slots are above the sequence"),
        (16, 99, "the floor is above the sequence"),
    ],
)
def test_an_unsound_table(
    table: Table, paths: DomainPaths, capsys: pytest.CaptureFixture[str], word: int, value: int, says: str
) -> None:
    overwrite(paths, word, value)
    assert says in told(capsys, "check", str(paths.table))


def test_a_root_that_is_no_slot(paths: DomainPaths, capsys: pytest.CaptureFixture[str]) -> None:
    Table.create(paths.name, 1024).close()
    overwrite(paths, 32 + 1024 // 64, 1)
    assert "a root slot does not exist" in told(capsys, "check", str(paths.table))


def test_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere" in told(capsys, "check", "/nowhere/at/all")


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no coherenced at" in told(capsys, "status", "--socket", str(tmp_path / "s"))


def test_a_bad_table_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "use one such as vt" in told(capsys, "status", "--table", "a/b")


def test_a_daemon_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        assert "does not answer" in told(capsys, "status", "--socket", str(tmp_path / "s"))


def test_a_distrusted_table_is_shown_as_such() -> None:
    status = Status(
        table="/dev/shm/vt",
        domain="00",
        pid=1,
        seconds=1.0,
        slots=1024,
        sequence=5,
        floor=TRUST_NOTHING,
        trusted=False,
        removed=False,
        roots=1,
        missing=[12, 34],
        outside=[],
        bumps_per_second=0.0,
        floor_raises={"trusted": 1, "overflow": 0, "mount": 2},
        distrusts=1,
        watch=Watching("inotify", 7, 10, 3, 1, 33, 20, 10, 3),
        dax=DaxUse(2, 128 << 30, 64 << 30, 7, 14 << 20, 256 << 30, 3, 5),
    )
    silent = Backend(pid=2, guest="g", cache="shared", device=1, inode=2, seconds=1.0, counters=None)
    text = render(client.Report(status, [silent]))
    assert "not trusted, waiting for the backends with pid 12, 34" in text
    assert "trust nothing" in text
    assert "no answer" in text
    assert "DAX       2 windows of 128G, 256G at most; 14M mapped, 7 mappings of 3 files, 5 refused" in text
    assert "inotify, 7 of 10 watches, 3 refused, 1 overflows, 33 changes: 20 bumped, 10 of backends, 3 of files" in text
    assert "raised 3 times (1 trusted, 2 mount), distrusted 1 times" in text
