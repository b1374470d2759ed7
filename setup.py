"""Compiled modules: every .pyx of the packages, each naming its own compiler flags."""

from Cython.Build import cythonize
from setuptools import setup

setup(ext_modules=cythonize(["src/coherent_vfs/*/**/*.pyx"], include_path=["src"]))
