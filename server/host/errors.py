"""Errors of the host's system calls."""

import os


def error(code: int) -> OSError:
    """The exception that stands for an errno."""
    return OSError(code, os.strerror(code))
