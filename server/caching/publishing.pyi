from coherent_vfs.coherence.shm.leases import Leases
from coherent_vfs.coherence.shm.table import Journal, Table

class Publisher:
    abandoning: bool
    held: int
    @property
    def made(self) -> int: ...
    def __init__(self, table: Table | None, journal: Journal | None, leases: Leases | None) -> None: ...
