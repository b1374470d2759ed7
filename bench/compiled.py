"""Compiled loops for benchmarks and tests: built in place when they are needed, and installed nowhere."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent

# Run in bench/, where setuptools finds no pyproject.toml and so takes no package for the project's.
_BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import setup
setup(ext_modules=cythonize(sys.argv[1], quiet=True), script_args=["-q", "build_ext", "-b", "..", "-t", "../build"])
"""


def load(name: str) -> ModuleType:
    """The compiled module of bench/NAME.pyx, built unless that is done already."""
    subprocess.run(
        [sys.executable, "-c", _BUILD, f"{name}.pyx"], cwd=ROOT / "bench", check=True, stderr=subprocess.DEVNULL
    )
    return importlib.import_module(f"bench.{name}")
