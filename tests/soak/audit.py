"""What must hold whenever all guests stand still, and what must be left of them at the end: nothing."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from coherent_vfs.coherence.protocol.constants import CHUNK
from coherent_vfs.coherence.protocol.messages import FileUse, WindowUse
from coherent_vfs.coherence.shm.table import Table
from coherent_vfs.guest.guest import Guest
from tests.integration.coherenced_process import SECONDS
from tests.soak.domain import WINDOW, Domain, Failed, Member, descriptors, fuse_mounts, start_time
from tests.soak.files import FILES
from tests.soak.messages import Held

NEVER: Final = (
    "Traceback",
    "a mapping is refused",
    "a release is refused",
    "a release of what was not granted",
    "refuses to know mappings",
)
"""In no log."""


def all_at_work(domain: Domain) -> None:
    """Wait until all guests have begun. Raises Failed."""

    def have_begun() -> bool:
        for member in domain.members:
            member.ask()
            member.say("go on")
        return all(member.counts["steps"] for member in domain.members)

    _eventually("all guests have begun", have_begun)


def audit(domain: Domain) -> None:
    """Let all guests stand still, and see that they, coherenced and the files agree. Raises Failed."""
    held: dict[str, list[Held]] = {}

    def nothing_is_being_replaced() -> bool:
        held.update({member.name: member.ask().held for member in domain.members})
        return all(chunk.mapped for chunks in held.values() for chunk in chunks)

    _eventually("all chunks of guests are mapped", nothing_is_being_replaced, lambda: str(held))
    for name, chunks in held.items():
        _window(name, chunks)
    _eventually("coherenced knows what guests have mapped", lambda: _known(domain) == _mapped(held))
    for model in domain.models:
        if difference := model.difference():
            raise Failed(difference)
    _logs(domain)
    for member in domain.members:
        member.say("go on")


def end(domain: Domain) -> None:
    """Have all end, one kind after the other, and see that nothing of them is left. Raises Failed."""
    audit(domain)
    for member in domain.members:
        member.end_guest()
    _eventually("nothing is mapped", lambda: _known(domain) == _mapped({it.name: [] for it in domain.members}))
    _eventually("no slot is pinned", lambda: not _pinned(domain))
    _no_window_too_many(domain)
    wanted = _open_after_a_guest(domain, domain.members[0])
    for member in domain.members:
        _closes(f"the backend of {member.name}", partial(_open, domain, member), wanted)
    for member in domain.members:
        member.backend.kill()
    _eventually("no window is left", lambda: not domain.use().windows)
    _eventually("no journal is left", lambda: not domain.daemon.paths.journal_keys())
    _eventually("no semaphore is left", lambda: not domain.semaphores & _semaphores())
    _eventually("no process is left", lambda: not _living(domain), lambda: str(_living(domain)))
    _eventually("no view is left", lambda: not domain.views & fuse_mounts(), lambda: str(domain.views & fuse_mounts()))
    _daemon(domain)
    _logs(domain)


def _window(name: str, chunks: list[Held]) -> None:
    moffsets = Counter(chunk.moffset for chunk in chunks)
    if any(count > 1 for count in moffsets.values()):
        raise Failed(f"{name} has two chunks at one moffset: {chunks}")
    if len(chunks) > WINDOW // CHUNK or any(moffset % CHUNK or moffset >= WINDOW for moffset in moffsets):
        raise Failed(f"{name} has chunks beyond its window: {chunks}")


_Known = tuple[Counter[str], dict[int, tuple[int, int]], int]
"""Mappings by guest; by inode how many and in how many windows; windows."""


def _mapped(held: dict[str, list[Held]]) -> _Known:
    files: dict[int, tuple[int, int]] = {}
    for inode in {chunk.inode for chunks in held.values() for chunk in chunks}:
        counts = [sum(chunk.inode == inode for chunk in chunks) for chunks in held.values()]
        files[inode] = sum(counts), sum(count > 0 for count in counts)
    return Counter({name: len(chunks) for name, chunks in held.items()}), files, len(held)


def _known(domain: Domain) -> _Known:
    report = domain.use()
    used: list[WindowUse | FileUse] = [*report.windows, *report.files]
    if wrong := [it for it in used if it.mapped_bytes != it.mappings * CHUNK]:
        raise Failed(f"mappings that are no chunks: {wrong}")
    if sum(window.size for window in report.windows) > report.use.total_limit:
        raise Failed(f"windows above the limit of all together: {report.windows}")
    windows = Counter({window.guest: window.mappings for window in report.windows})
    return windows, {file.inode: (file.mappings, file.windows) for file in report.files}, len(report.windows)


def _pinned(domain: Domain) -> list[int]:
    table = Table.open(domain.daemon.paths.table)
    try:
        return table.pinned()
    finally:
        table.close()


def _no_window_too_many(domain: Domain) -> None:
    """One more window than there is room for is refused, and its backend says why."""
    backend = domain.backend("more")
    try:
        backend.start()
    except AssertionError:
        if "--dax-total" not in backend.log():
            raise Failed(f"a window too many was refused, but not in words: {backend.log()}") from None
        return
    backend.kill()
    raise Failed("a window too many was granted")


def _open_after_a_guest(domain: Domain, member: Member) -> Counter[str]:
    """What a backend has open that was just started, and had one guest."""
    member.backend.kill()
    member.start_backend()
    with (
        Guest.connect(member.backend.socket, table=domain.daemon.paths.table, dax="inode") as guest,
        guest.open(f"/{FILES[0].name}", os.O_RDWR) as file,
    ):
        file.pwrite(b"", 0)
    return _open(domain, member)


def _open(domain: Domain, member: Member) -> Counter[str]:
    """What a backend has open, by kind."""
    process = member.backend.process
    assert process is not None
    return _kinds(domain, process.pid)


def _closes(who: str, is_open: Callable[[], Counter[str]], wanted: Counter[str]) -> None:
    """A process comes to have no more open than this, by kind."""
    _eventually(
        f"{who} has closed what it need not have open", lambda: not is_open() - wanted, lambda: str(is_open() - wanted)
    )


def _kinds(domain: Domain, pid: int) -> Counter[str]:
    """Descriptors of a process, by kind."""
    return Counter(_kind(text, domain.share) for text in descriptors(pid))


def _kind(text: str, share: Path) -> str:
    """What an open descriptor is, by what it links to; each file of the share, and each view, for itself."""
    if re.fullmatch(r"/\d+", text) or Path(text).is_relative_to(share):
        return text
    return "a file" if re.match("/(?!memfd:)", text) else re.sub(r":\[\d+\]", "", text)


def _semaphores() -> set[int]:
    lines = Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
    return {int(line.split()[0]) & 0xFFFFFFFF for line in lines}


def _living(domain: Domain) -> list[int]:
    return [pid for pid, started in domain.processes.items() if start_time(pid) == started]


def _daemon(domain: Domain) -> None:
    """coherenced has closed everything, and leaves its three files in shared memory."""
    daemon, paths = domain.daemon, domain.daemon.paths
    assert daemon.process is not None
    # The last who asked it has only just hung up.
    _closes(
        "coherenced",
        partial(_kinds, domain, daemon.process.pid),
        Counter(_kind(text, domain.share) for text in domain.fresh),
    )
    if status := daemon.stop():
        raise Failed(f"coherenced ended with status {status}")
    left = set(paths.table.parent.glob(f"{paths.table.name}*"))
    if files := left - {paths.table, paths.leases, paths.lock}:
        raise Failed(f"left in shared memory: {files}")


def _logs(domain: Domain) -> None:
    for line in domain.logs().splitlines():
        if any(words in line for words in NEVER):
            raise Failed(f"a log says: {line}")


def _eventually(what: str, is_so: Callable[[], bool], instead: Callable[[], str] = str) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise Failed(f"not after {SECONDS:.0f} s: {what}; {instead()}")
        time.sleep(0.02)
