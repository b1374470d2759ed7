"""What our commands have in common on their command lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

from coherent_vfs.coherence.ctl.main import main as coherencectl
from coherent_vfs.coherence.daemon.main import main as coherenced
from coherent_vfs.server.main import main as vfs_backend

COMMANDS = {"coherenced": coherenced, "coherencectl": coherencectl, "vfs-backend": vfs_backend}


@pytest.mark.parametrize(("name", "main"), COMMANDS.items())
def test_each_command_tells_its_version(
    name: str, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr() == (f"{name} {metadata.version('coherent-vfs')}\n", "")


def test_the_version_costs_nothing_where_nobody_asks_for_it() -> None:
    modules = ", ".join(main.__module__ for main in COMMANDS.values())
    program = f"import sys, {modules}\nprint('importlib.metadata' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
