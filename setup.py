"""Compiled modules: every .pyx of the packages, each naming its own compiler flags."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import setup

# A source distribution has no links.
for package in ("coherence", "server", "guest"):
    link = Path("src/coherent_vfs", package)
    if not link.exists():
        link.symlink_to(Path("../..", package))

setup(ext_modules=cythonize(["src/coherent_vfs/*/**/*.pyx"], include_path=["src"]))
