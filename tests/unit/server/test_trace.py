"""--log-level trace: each request and its answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coherent_vfs.coherence.common import log
from coherent_vfs.server.device.trace import describe
from coherent_vfs.server.fuse.protocol import (
    FORGET_IN,
    INTERRUPT_IN,
    MKDIR_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    WRITE_IN,
    Opcode,
)
from tests.unit.server.leased import LeaseDomain
from tests.unit.server.raw_guest import RawGuest, raw_guest
from tests.unit.server.test_parking import park


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """What has been logged of requests, without what differs from run to run."""
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in logged if line["event"] == "request"]
    for line in told:
        assert isinstance(line.pop("us"), int)
        assert isinstance(line.pop("unique"), int)
        for key in "event", "logger", "level", "timestamp":
            del line[key]
    return told


def session(guest: RawGuest) -> int:
    """A request of each kind that is told of differently; the number of the file."""
    guest.request(Opcode.LOOKUP, 1, b"none\0")
    guest.request(Opcode.LOOKUP, 1, b"two\nlines\0")
    guest.request(Opcode.MKDIR, 1, MKDIR_IN.pack(0o755, 0) + b"d\0")
    guest.request(Opcode.OPEN, 1)
    error, entry = guest.request(Opcode.LOOKUP, 1, b"file\0")
    assert error == 0
    nodeid = int.from_bytes(entry[:8], "little")
    error, opened = guest.request(Opcode.OPEN, nodeid, OPEN_IN.pack(2, 0))
    assert error == 0
    fh = OPEN_OUT.unpack(opened)[0]
    guest.request(Opcode.READ, nodeid, READ_IN.pack(fh, 2, 100, 0, 0, 0))
    guest.request(Opcode.WRITE, nodeid, WRITE_IN.pack(fh, 4, 3, 0, 0, 0) + b"new")
    guest.request(999, 1)
    guest.tell(Opcode.FORGET, nodeid, FORGET_IN.pack(1))
    return nodeid


def test_each_request_is_a_line_with_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("content")
    log.configure("trace", json=True)
    with raw_guest(tmp_path, xattr=True) as guest:
        capsys.readouterr()
        nodeid = session(guest)
    told = lines(capsys)
    assert [line for line in told if line["op"] != "OPEN"] == [
        {"op": "LOOKUP", "nodeid": 1, "name": "none", "answer": "ENOENT"},
        {"op": "LOOKUP", "nodeid": 1, "name": "'two\\nlines'", "answer": "ENOENT"},
        {"op": "MKDIR", "nodeid": 1, "name": "d", "answer": "128 bytes"},
        {"op": "LOOKUP", "nodeid": 1, "name": "file", "answer": "128 bytes"},
        {"op": "READ", "nodeid": nodeid, "offset": 2, "size": 100, "answer": "5 bytes"},
        {"op": "WRITE", "nodeid": nodeid, "offset": 4, "size": 3, "answer": "8 bytes"},
        {"op": 999, "nodeid": 1, "answer": "ENOSYS"},
        {"op": "FORGET", "nodeid": nodeid, "answer": "none"},
    ]
    assert [line["answer"] for line in told if line["op"] == "OPEN"] == ["EINVAL", "16 bytes"]


def test_a_request_that_waits_is_told_of_twice(domain: LeaseDomain, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trace", json=True)
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        other.wait(lambda: pending.done)
    answers = [line["answer"] for line in lines(capsys) if line["op"] == "SETATTR"]
    assert answers[0] == "parked"
    assert answers[-1] == "104 bytes"


def test_an_interrupted_request_is_told_of(domain: LeaseDomain, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("trace", json=True)
    with domain.guest() as guest, domain.guest() as other:
        pending = park(guest, other)
        other.post(Opcode.INTERRUPT, 0, INTERRUPT_IN.pack(pending.unique))
        other.wait(lambda: pending.done)
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["unique"], line["answer"]) for line in told if line["event"] == "interrupted"] == [
        (pending.unique, "EINTR")
    ]


def test_nothing_is_told_at_debug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("content")
    log.configure("debug", json=True)
    with raw_guest(tmp_path) as guest:
        session(guest)
    assert lines(capsys) == []


@pytest.mark.parametrize("opcode", [*Opcode, 0, 999, 1 << 31])
@pytest.mark.parametrize("body", [b"", b"\0", b"\xff" * 7, b"\xff" * 512])
def test_any_body_can_be_told_of(opcode: int, body: bytes) -> None:
    assert describe(opcode, 1, 2, body)["nodeid"] == 2
