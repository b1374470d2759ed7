"""Programs of the laboratory end with whoever started them, whatever happens."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.lab import process as process_module
from tests.lab.paths import CHECKOUT, LabError
from tests.lab.process import Process


def has_ended(pid: int) -> bool:
    """Whether a process ends within a minute; as a zombie it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(60_000))
    finally:
        os.close(descriptor)


def test_output_and_exit_status(tmp_path: Path) -> None:
    with Process(["sh", "-c", "echo out; echo err >&2; exit 3"], log=tmp_path / "log") as process:
        assert process.wait(60) == 3
        assert process.output() == "out\nerr\n"
        assert not process.running


def test_what_cannot_be_killed_is_left_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a QEMU that hangs in the kernel, opening /dev/kvm; here its leash is held up."""
    monkeypatch.setattr(process_module, "KILL_TIMEOUT", 0.2)
    process = Process(["sleep", "1000"], log=tmp_path / "log")
    leash = process._leash.pid
    os.kill(leash, signal.SIGSTOP)
    process.kill()
    assert process.running
    os.kill(leash, signal.SIGCONT)
    assert has_ended(process.pid)
    assert process._leash.wait(60) == 0


def test_death_by_a_signal_is_told(tmp_path: Path) -> None:
    with Process(["sleep", "1000"], log=tmp_path / "log") as process:
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(60) == -signal.SIGUSR1


def test_wait_has_a_time_limit(tmp_path: Path) -> None:
    with (
        Process(["sleep", "1000"], log=tmp_path / "log") as process,
        pytest.raises(LabError, match=r"sleep still runs after 0\.05 s"),
    ):
        process.wait(0.05)


def test_program_that_does_not_exist(tmp_path: Path) -> None:
    with Process(["/no/such/program"], log=tmp_path / "log") as process:
        assert process.wait(60) != 0
        assert "/no/such/program" in process.output()


def test_descendants_end_with_the_with_statement(tmp_path: Path) -> None:
    with Process(family(tmp_path), log=tmp_path / "log") as process:
        child = child_of(process, tmp_path)
    assert has_ended(process.pid)
    assert has_ended(child)


def test_program_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    processes: list[Process] = []
    thread = threading.Thread(target=lambda: processes.append(Process(["sleep", "1000"], log=tmp_path / "log")))
    thread.start()
    thread.join()
    with processes[0] as process:
        assert process.running
        os.kill(process.pid, 0)


def test_program_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, signal; from pathlib import Path; from tests.lab.process import Process\n"
        "process = Process(['sleep', '1000'], log=Path(sys.argv[1]))\n"
        "print(process.pid, flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=CHECKOUT) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    assert has_ended(pid)


def family(folder: Path) -> list[str]:
    """A program with a child that does not go by itself."""
    return ["sh", "-c", f"cd '{folder}'; sleep 1000 & echo $! > child; echo ready; wait"]


def child_of(process: Process, folder: Path) -> int:
    while "ready" not in process.output():
        assert process.running
        threading.Event().wait(0.01)
    return int((folder / "child").read_text())
