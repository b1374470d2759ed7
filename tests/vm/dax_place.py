"""What every test of DAX in real guests begins with."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import assets, backends
from tests.lab.paths import LabError
from tests.views import need_views


@dataclass(frozen=True)
class DaxPlace:
    """Where a test is at home.

    Attributes:
        share: the directory to share; on a disk, as what is shared is.
        folder: for sockets and logs.
        table: the name of a version table.
    """

    share: Path
    folder: Path
    table: str

    def coherence(self, daemon: backends.Backend) -> list[str]:
        """The options by which a backend is in the domain of this daemon."""
        return ["--coherence", f"/dev/shm{self.table}", "--coherence-socket", str(daemon.socket)]


@contextmanager
def dax_place() -> Iterator[DaxPlace]:
    """Make it; nothing of it is left. Skips the test where no guest can have a window."""
    need_views()
    try:
        assets.qemu_dax()
    except LabError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        share = Path(tempfile.mkdtemp(dir="/var/tmp"))
        stack.callback(shutil.rmtree, share)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-")))
        table = f"/vt-dax-{os.getpid()}-{secrets.token_hex(3)}"
        stack.callback(backends.remove_table, table)
        yield DaxPlace(share, folder, table)
