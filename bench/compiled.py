"""Compiled loops for benchmarks and tests: built in place when they are needed, and installed nowhere."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """The compiled module of bench/NAME.pyx, built unless that is done already."""
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "--quiet", f"bench/{name}.pyx"]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return importlib.import_module(f"bench.{name}")
