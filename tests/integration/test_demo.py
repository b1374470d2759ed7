"""The demo tells what it is meant to tell, staleness included, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lab import assets
from tests.lab.paths import CHECKOUT, LabError

MODES = ["none", "auto", "always", "shared"]
QUIET = "nothing changes, guest 2 looks 100 times"
BY_GUESTS = ["guest 1 writes a file", "guest 2 writes it again", "guest 1 creates a file", "guest 2 removes it"]
IMPATIENT = (
    "import runpy; from demo import account; account.PATIENCE = 0.5; runpy.run_module('demo', run_name='__main__')"
)


def account(*options: str, timeout: float, program: Sequence[str] = ("-m", "demo")) -> list[tuple[str, dict[str, str]]]:
    """Run the demo; for each stage, its mode and who, and the outcome of each scene."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        ended = subprocess.run(
            [sys.executable, *program, *options],
            cwd=CHECKOUT,
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert list(Path(folder).iterdir()) == []
    table = re.search(r"\(table (vt-demo-\S+)\)", ended.stdout)
    assert table
    assert [path for path in Path("/dev/shm").iterdir() if table[1] in path.name] == []
    assert "No QEMU guests" not in ended.stdout
    stages = []
    for part in ended.stdout.split("\ncache=")[1:]:
        title, *lines = part.split("\n\n")[0].splitlines()
        stages.append((" ".join(title.split()), dict(re.split("  +", line.strip(), maxsplit=1) for line in lines)))
    return stages


def check_quiet(outcomes: dict[str, str]) -> None:
    """Only the first looks took requests: those before coherenced said that it watches the directory."""
    assert int(outcomes[QUIET].removesuffix(" requests")) < 10


def check_coherent(outcomes: dict[str, str]) -> None:
    for change in BY_GUESTS:
        assert re.match("guest [12] sees it at once", outcomes[change]), change


def test_embedded_guests() -> None:
    # Nobody has to be convinced by waiting for long that somebody never sees a change.
    stages = account("--embedded", timeout=280, program=("-c", IMPATIENT))
    assert [title.split()[0] for title, _ in stages] == MODES
    outcomes = {title.split()[0]: seen for title, seen in stages}
    assert outcomes["always"][QUIET] == "0 requests"
    check_quiet(outcomes["shared"])
    assert int(outcomes["none"][QUIET].removesuffix(" requests")) >= 100
    check_coherent(outcomes["none"])
    check_coherent(outcomes["shared"])
    assert outcomes["always"]["guest 1 writes a file"].startswith("guest 2 DOES NOT SEE IT")
    assert outcomes["always"]["guest 2 removes it"].startswith("guest 1 DOES NOT SEE IT")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_virtual_machines() -> None:
    try:
        assets.cloud_kernel()
    except LabError as error:
        pytest.skip(str(error))
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no QEMU: python -m tests.lab.setup")
    stages = account(timeout=360)
    assert [title for title, _ in stages] == [
        *(f"{mode} guests with a stock kernel" for mode in MODES),
        "shared guests that check the version table",
    ]
    outcomes = dict(stages)
    check_coherent(outcomes["none guests with a stock kernel"])
    check_coherent(outcomes["shared guests with a stock kernel"])
    assert outcomes["always guests with a stock kernel"]["guest 1 writes a file"].startswith("guest 2 DOES NOT SEE IT")
    aware = outcomes["shared guests that check the version table"]
    check_quiet(aware)
    check_coherent(aware)
