"""The journals of a table's backends, as coherenced keeps them.

A journal is a page of shared memory named after the key of the semaphore that its backend holds. coherenced
reads one only with read(2), never mapped: its backend has it writable, so it may be cut off or hold anything.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import posix_ipc  # type: ignore[import-not-found]

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm import liveness
from coherent_vfs.coherence.shm.paths import DomainPaths, open_file
from coherent_vfs.coherence.shm.table import JOURNAL_BYTES, JournalContent, journal_content, parse_journal


def create(paths: DomainPaths, domain: bytes, uid: int, backend_id: int) -> int:
    """Make a journal and its semaphore for a process of this user, a backend with this number.

    Returns:
        The key of both. UserError when there is no memory or no semaphore left.
    """
    while True:
        key = secrets.randbelow((1 << 31) - 1) + 1
        # The file comes first: after a kill in between it is what leads a new daemon to the semaphore.
        try:
            memory = posix_ipc.SharedMemory(f"/{paths.journal(key).name}", posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            continue
        except (posix_ipc.Error, OSError) as error:
            raise UserError(f"no journal can be made: {error}: free shared memory") from None
        try:
            os.posix_fallocate(memory.fd, 0, JOURNAL_BYTES)
            os.pwrite(memory.fd, journal_content(domain, backend_id), 0)
            if liveness.create(key, uid):
                return key
            paths.journal(key).unlink()
        except UserError:
            paths.journal(key).unlink()
            raise
        except OSError as error:
            paths.journal(key).unlink()
            raise UserError(f"no journal can be made: {error.strerror}: free shared memory") from None
        finally:
            memory.close_fd()


def open_fd(paths: DomainPaths, key: int) -> int:
    """A writable descriptor of the journal, to be given to its backend. UserError when there is none."""
    try:
        return open_file(paths.journal(key), os.O_RDWR)
    except OSError as error:
        raise UserError(f"{paths.journal(key)}: {error.strerror}: restart the backend") from None


def read(path: Path) -> JournalContent | None:
    """What a journal says; None when that cannot be told: its backend may have been about to change anything."""
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb", buffering=0) as file:
            return parse_journal(file.read(JOURNAL_BYTES))
    except (OSError, UserError):
        return None


def remove(paths: DomainPaths, key: int) -> None:
    """Remove the journal and its semaphore; the file goes last, so that a kill in between loses neither."""
    liveness.remove(key)
    paths.journal(key).unlink(missing_ok=True)
