from typing import Protocol

from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import Table
from coherent_vfs.server.caching.publishing import Publisher
from coherent_vfs.server.settings import Settings

class Watcher(Protocol):
    def watch(self, fd: int, nodeid: int, /) -> bool: ...
    def unwatch(self) -> None: ...

class Validity:
    given: int
    clock_step: int
    def __init__(
        self, settings: Settings, table: Table | None, leases: Leases | None, publisher: Publisher
    ) -> None: ...
    def adopt(self, timeout: float, aware: bool) -> None: ...
    def watch_with(self, watcher: Watcher) -> None: ...
