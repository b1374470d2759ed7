"""The systemd units: systemd finds nothing wrong with them, and our commands take what they pass."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from coherent_vfs.coherence.daemon.main import _parser
from coherent_vfs.server.options import parse

PACKAGING = Path(__file__).parents[3] / "packaging"
UNITS = ["coherenced.service", "vfs-backend@.service"]


def command(unit: str) -> list[str]:
    """The arguments of ExecStart, with the unit's own environment and some instance put in."""
    text = (PACKAGING / unit).read_text()
    (line,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)
    environment = dict(
        pair.split("=") for e in re.findall(r"^Environment=(.*)$", text, re.MULTILINE) for pair in e.split()
    )
    environment |= {"SHARED_DIR": "/srv/data"}
    line = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: environment[m[1] or m[2]], line)
    return shlex.split(line.replace("%i", "vm1"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong(tmp_path: Path, unit: str) -> None:
    # The commands are not installed where the unit says.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (PACKAGING / unit).read_text(), flags=re.MULTILINE)
    (tmp_path / unit).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_daemon_takes_its_arguments() -> None:
    assert _parser().parse_args(command("coherenced.service")).config == Path("/etc/coherenced.toml")


def test_the_backend_takes_its_arguments() -> None:
    options = parse(command("vfs-backend@.service"))
    assert options.share.shared_dir == Path("/srv/data")
    assert options.socket_path == Path("/run/vfs-backend/vm1.sock")
    assert (options.share.cache, options.coherence) == ("shared", Path("/dev/shm/vt"))
    assert (options.share.tag, options.guest) == ("vm1", "vm1")
