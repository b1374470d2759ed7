"""Where the things of a domain are: everything is named after its version table."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from coherent_vfs.coherence.common.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
RUN = Path("/run/coherenced")


def table_path(table: str | Path) -> Path:
    """The file of a table as a user names it: vt and /vt are /dev/shm/vt; what has further slashes is a path."""
    text = os.fspath(table)
    name = text.removeprefix("/")
    return SHARED_MEMORY / name if name and "/" not in name else Path(text)


def socket_of(table: str | Path) -> Path:
    """The control socket that belongs to a table: /run/coherenced/vt.sock for vt.

    An ordinary user cannot write there: the socket is in $XDG_RUNTIME_DIR/coherenced then, if that is set (the XDG Base
    Directory Specification ignores a relative path).
    """
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    directory = Path(own, RUN.name) if os.geteuid() != 0 and Path(own).is_absolute() else RUN
    return directory / f"{table_path(table).name}.sock"


def existing_socket_of(table: str | Path) -> Path:
    """The socket at which a client finds coherenced: the user's own, or the system's where only that exists."""
    own = socket_of(table)
    system = RUN / own.name
    return system if os.access(system, os.F_OK) and not os.access(own, os.F_OK) else own


def open_file(path: Path, flags: int) -> int:
    """Open a file of a domain: what is a regular file under this very name, and nothing that could be waited for.

    Args:
        path: of the file.
        flags: of open(2); a file that is made is its owner's alone.

    Returns:
        A descriptor that the caller closes. OSError when the file cannot be opened or is of another kind.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        # A symbolic link, a directory, a socket.
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return fd


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


@dataclass(frozen=True)
class DomainPaths:
    """The names that coherenced uses for one table.

    Args:
        name: the table's name, such as "vt"; "/vt" and "/dev/shm/vt" are understood, too. UserError when it cannot
            be one.
    """

    name: str

    def __post_init__(self) -> None:
        path = table_path(self.name)
        if path.parent != SHARED_MEMORY or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", path.name):
            raise UserError(f"table name {self.name!r}: use one such as vt, without slashes")
        # What belongs to another table must not be taken for a table that was never finished, and be replaced.
        if re.search(r"\.lock$|\.leases$|\.journal\.", self.name):
            raise UserError(f"table name {self.name!r}: use one without .lock, .leases or .journal. in it")
        object.__setattr__(self, "name", path.name)

    @property
    def table(self) -> Path:
        """The table's file."""
        return SHARED_MEMORY / self.name

    @property
    def leases(self) -> Path:
        """The lease table's file."""
        return SHARED_MEMORY / f"{self.name}.leases"

    @property
    def lock(self) -> Path:
        """The file whose lock the one coherenced of this table holds."""
        return SHARED_MEMORY / f"{self.name}.lock"

    def journal(self, key: int) -> Path:
        """The journal whose holder has the SysV semaphore with this key."""
        return SHARED_MEMORY / f"{self.name}.journal.{key:08x}"

    def journal_keys(self) -> list[int]:
        """The keys of all journals that there are; a file of another user is not one."""
        prefix = f"{self.name}.journal."
        keys = []
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            suffix = path.name.removeprefix(prefix)
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if re.fullmatch("[0-9a-f]{8}", suffix) and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                keys.append(int(suffix, 16))
        return keys
