from coherence.leases import Leases
from coherence.table import Journal, Table

class Changes:
    made: int
    held: int
    def __init__(self, table: Table | None, journal: Journal | None, leases: Leases | None) -> None: ...
