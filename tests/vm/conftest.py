"""Fixtures of the tests in real guests: the directory to share, a folder for sockets, the kind of guest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import assets
from tests.lab.paths import LabError


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder for sockets and logs, with a short path: a Unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        yield Path(folder)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """The directory that is shared."""
    folder = tmp_path / "share"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of guest, by parameter; tests of a kind that was not fetched are skipped."""
    wanted: str = getattr(request, "param", "qemu")
    try:
        _ = assets.cloud_kernel() if wanted == "qemu" else assets.uml_kernel()
    except LabError as error:
        pytest.skip(str(error))
    return wanted


@pytest.fixture
def userland(kind: str) -> str:
    """The root of a guest with a whole userland."""
    if kind == "uml":
        return "host"
    try:
        return f"image:{assets.userland_image()}"
    except LabError as error:
        pytest.skip(str(error))
