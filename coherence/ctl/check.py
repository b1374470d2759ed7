"""coherencectl check: is a file a sound version table?"""

from __future__ import annotations

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.table import ABI_VERSION, TRUST_NOTHING, Table


def check(path: str) -> str:
    """Validate a table file; returns one line about it. UserError says what is wrong with it."""
    table = Table.open(path)
    try:
        faults = []
        if above := table.slots_above_sequence():
            faults.append(f"{above} slots are above the sequence")
        if TRUST_NOTHING != table.floor > table.sequence:
            faults.append("the floor is above the sequence")
        roots = table.root_bits
        if any(root >= table.slot_count for root in roots):
            faults.append("a root slot does not exist")
        if faults:
            raise UserError(f"{path}: {', '.join(faults)}: stop all that uses it and remove it")
        return (
            f"{path}: sound: ABI {ABI_VERSION}, {table.slot_count} slots, sequence {table.sequence}, "
            f"{len(roots)} roots, domain {table.domain.hex()}"
        )
    finally:
        table.close()
