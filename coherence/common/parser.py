"""The command-line parser of our commands: wrong usage is one line and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help keeps its line breaks and whose options cannot be abbreviated."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to look; ends with status 2."""
        self.exit(2, f"{self.prog}: {message}: see {self.prog} --help\n")


class PrintVersion(argparse.Action):
    """The option --version: print the command's name and the installed version; ends with status 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata  # slow to load, and needed only here

        try:
            installed = metadata.version("coherent-vfs")
        except metadata.PackageNotFoundError:
            installed = "(not installed, run from its sources)"
        print(parser.prog, installed)
        parser.exit()
