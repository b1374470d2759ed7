"""Whether the owner of something is alive: a SysV semaphore taken with SEM_UNDO.

The kernel gives the semaphore back when the process that took it ends, however it ends. Unlike a file lock
it is not inherited by fork or passed on with a descriptor, and unlike a process id it is never reused.
docs/development/locks.md says which primitive serves what and why.
"""

from __future__ import annotations

import errno
import os

import sysv_ipc  # type: ignore[import-not-found]

from coherent_vfs.coherence.common.errors import UserError


def create(key: int, uid: int) -> bool:
    """Make the semaphore that a process of this user may take; False when the key is in use already."""
    try:
        semaphore = sysv_ipc.Semaphore(key, sysv_ipc.IPC_CREX, 0o600, 1)
    except sysv_ipc.ExistentialError:
        return False
    except OSError as error:
        raise UserError(f"no SysV semaphore can be made: {error.strerror}: raise the limit kernel.sem") from None
    semaphore.uid = uid
    return True


def take(key: int) -> None:
    """Hold the semaphore until let_go or the end of this process. UserError when it cannot be reached."""
    try:
        semaphore = sysv_ipc.Semaphore(key)
        semaphore.undo = True
        # A timeout of 0 would wait for ever.
        semaphore.block = False
        semaphore.acquire()
    except (sysv_ipc.Error, OSError) as error:
        raise UserError(
            f"the SysV semaphore {key:#x} of coherenced cannot be taken ({error}): "
            "run this in the IPC namespace of coherenced"
        ) from None


def let_go(key: int) -> None:
    """Give back what take took; nothing when coherenced has removed it already."""
    try:
        semaphore = sysv_ipc.Semaphore(key)
        semaphore.undo = True
        semaphore.release()
    except sysv_ipc.ExistentialError:
        return


def owner(key: int) -> int | None:
    """The process that holds the semaphore, as numbered in this pid namespace; None when it has none.

    A semaphore that may not be read counts as held, by process 0: its holder cannot be proved dead. One that was
    taken without SEM_UNDO, by a process that wants to seem alive for ever, is held no longer than that process lives.
    """
    try:
        semaphore = sysv_ipc.Semaphore(key)
        pid = int(semaphore.last_pid)
        return pid if semaphore.value == 0 and (pid == 0 or _lives(pid)) else None
    except sysv_ipc.ExistentialError:
        return None
    except sysv_ipc.PermissionsError:
        return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        # EPERM: it lives, as another user.
        return error.errno != errno.ESRCH
    return True


def remove(key: int) -> None:
    """Remove the semaphore if it is there."""
    try:
        sysv_ipc.Semaphore(key).remove()
    except sysv_ipc.ExistentialError:
        return
