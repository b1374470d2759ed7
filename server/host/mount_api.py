"""A mount of a FUSE file system that is attached nowhere, and a process that may do little else."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

CAP_SYS_ADMIN: Final = 21

# System call numbers of the mount API, the same on every architecture that we run on (linux/unistd.h).
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
# linux/mount.h
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOUNT_ATTR_NOSUID: Final = 0x2
_MOUNT_ATTR_NODEV: Final = 0x4
_MOUNT_ATTR_NOEXEC: Final = 0x8
# linux/prctl.h
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
# linux/capability.h
_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def mount_fuse(device_fd: int, name: str) -> int:
    """Mount what is served at an open /dev/fuse; it goes when the last descriptor of it, or of its files, does.

    Args:
        device_fd: of /dev/fuse. The server may run on it from here on; INIT waits there.
        name: the mount's source, as it is told in /proc/self/mountinfo.

    Returns:
        A descriptor of the root directory, for openat(2). Any user who gets hold of it may use it.

    Raises:
        OSError: no such file system (ENODEV), or not permitted (EPERM).
    """
    context_fd = _checked(_libc.syscall(_FSOPEN, b"fuse", _FSOPEN_CLOEXEC))
    try:
        strings = {
            "source": name,
            "fd": str(device_fd),
            "rootmode": "40000",
            "user_id": str(os.geteuid()),
            "group_id": str(os.getegid()),
        }
        for key, value in strings.items():
            _checked(_libc.syscall(_FSCONFIG, context_fd, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0))
        _checked(_libc.syscall(_FSCONFIG, context_fd, _FSCONFIG_SET_FLAG, b"allow_other", None, 0))
        _checked(_libc.syscall(_FSCONFIG, context_fd, _FSCONFIG_CMD_CREATE, None, None, 0))
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        return _checked(_libc.syscall(_FSMOUNT, context_fd, _FSMOUNT_CLOEXEC, attributes))
    finally:
        os.close(context_fd)


def keep_only(capability: int) -> None:
    """Give up all capabilities of this process but one (capabilities(7)), for good.

    Raises:
        OSError: EPERM, it has not even that one.
    """
    for other in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if other != capability:
            # Without CAP_SETPCAP the bounding set stays as it is; PR_SET_NO_NEW_PRIVS makes it unreachable.
            _libc.prctl(_PR_CAPBSET_DROP, other, 0, 0, 0)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # effective, permitted, inheritable, of capabilities 0 to 31 and then of those above.
    sets = (ctypes.c_uint32 * 6)(1 << capability, 1 << capability, 0, 0, 0, 0)
    _checked(_libc.capset(header, sets))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
