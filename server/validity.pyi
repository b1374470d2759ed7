from collections.abc import Callable

from coherence.leases import Leases
from coherence.table import Table
from server.changes import Changes
from server.settings import Settings

class Validity:
    given: int
    def __init__(self, settings: Settings, table: Table | None, leases: Leases | None, changes: Changes) -> None: ...
    def adopt(self, timeout: float, aware: bool) -> None: ...
    def watch_with(self, watcher: Callable[[int, int], bool]) -> None: ...
