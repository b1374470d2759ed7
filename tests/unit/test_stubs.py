"""The stubs of the compiled modules say what the modules have (mypy.stubtest)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Arguments of __cinit__() cannot be seen at runtime, and types that only stubs have are not there.
ALLOWED = r"""
.*\.__init__
.*\.(On[A-Z]\w+|RaiseFloor|Watcher)
.*\.invalidator\.What
"""


def test_stubs_say_what_the_compiled_modules_have(tmp_path: Path) -> None:
    stubs = [path for package in ("coherence", "server", "guest") for path in (ROOT / package).rglob("*.pyi")]
    assert len(stubs) > 20
    allowed = tmp_path / "allowed"
    allowed.write_text(ALLOWED)
    modules = ["coherent_vfs." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in stubs]
    options = ["--concise", "--ignore-missing-stub", "--ignore-disjoint-bases", "--ignore-unused-allowlist"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *options, "--allowlist", allowed, *modules],
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
