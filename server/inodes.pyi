from coherence.table import Table

class InodeTable:
    live: int
    idle: int
    def __init__(self, root_fd: int, table: Table | None) -> None: ...
    def clear(self) -> None: ...
