"""A tmpfs of a few megabytes that is mounted nowhere: it goes with this process, whatever happens. Needs root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# System calls of the mount API (linux/unistd.h), and what they take (linux/mount.h).
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_SET_STRING, _CREATE, _CLOEXEC = 1, 6, 1

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def small_tmpfs(**options: str) -> Iterator[Path]:
    """Make one, and give its root as a path that any process of root's can open.

    Args:
        options: of the mount, such as size="4M".
    """
    if os.geteuid():
        pytest.skip("only root can mount a tmpfs")
    context_fd = _checked(_libc.syscall(_FSOPEN, b"tmpfs", _CLOEXEC))
    try:
        for key, value in options.items():
            _checked(_libc.syscall(_FSCONFIG, context_fd, _SET_STRING, key.encode(), value.encode(), 0))
        _checked(_libc.syscall(_FSCONFIG, context_fd, _CREATE, None, None, 0))
        root_fd = _checked(_libc.syscall(_FSMOUNT, context_fd, _CLOEXEC, 0))
    finally:
        os.close(context_fd)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{root_fd}")
    finally:
        os.close(root_fd)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
