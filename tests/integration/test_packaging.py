"""The source distribution has all that an installation needs, and the installed commands run."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_install_from_the_source_distribution(tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    archive = tmp_path / made.stdout.splitlines()[-1]
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {
        str(path.relative_to(CHECKOUT))
        for package in ("coherence", "server", "guest")
        for path in (CHECKOUT / package).rglob("*.py*")
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi")
    }
    assert not sources - names
    assert not [name for name in names if name.endswith(".so")]

    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(environment / "bin/pip"), "install", "--quiet", str(archive)], check=True)
    for command in ("vfs-backend", "coherenced", "coherencectl"):
        helped = subprocess.run(
            [str(environment / "bin" / command), "--help"], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert "usage" in helped.stdout
