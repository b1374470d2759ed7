"""The command-line parser of our commands: wrong usage is one line and exit status 2."""

from __future__ import annotations

import argparse
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
