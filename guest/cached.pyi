"""Types of kept.pyx."""

from collections.abc import Callable
from os import PathLike, stat_result
from typing import Final

from coherent_vfs.coherence.shm.table import Table
from coherent_vfs.guest.cache import Listing, Target
from coherent_vfs.server.fuse.protocol import Attr

FOREVER: Final[float]
MAX_SYMLINKS: Final[int]

class Rule:
    aware: bool
    def stamp(self) -> int: ...
    def good(self, slot: int, stamp: int, expiry: float) -> bool: ...
    def changed(self, *slots: int) -> None: ...
    def inode_slot(self, nodeid: int) -> int: ...
    def name_slot(self, nodeid: int, name: bytes) -> int: ...

class TableRule(Rule):
    table: Table
    def __init__(self, table: Table) -> None: ...

class TimeRule(Rule):
    def __init__(self) -> None: ...

class Attributes:
    attr: Attr
    stat: stat_result
    stamp: int
    expiry: float
    def __init__(self, attr: Attr, stat: stat_result, stamp: int, expiry: float) -> None: ...

class Node:
    nodeid: int
    slot: int
    kind: int
    lookups: int
    dax: bool
    outdated: bool
    names: dict[bytes, Name]
    attributes: Attributes | None
    listing: Listing | None
    target: Target | None
    generation: object
    def __init__(
        self, nodeid: int, slot: int, kind: int, forgotten: list[tuple[int, int]], dax: bool = False
    ) -> None: ...
    def drop_pages(self) -> None: ...

class Name:
    directory: Node
    name: bytes
    node: Node | None
    slot: int
    stamp: int
    expiry: float
    recent: bool
    def __init__(
        self, directory: Node, name: bytes, node: Node | None, slot: int, stamp: int, expiry: float
    ) -> None: ...

class Hits:
    names: int
    attributes: int
    listings: int
    targets: int
    pages: int

def cached_attributes(node: Node, rule: Rule, hits: Hits) -> Attributes | None: ...
def walk(
    root: Node,
    rule: Rule,
    hits: Hits,
    path: str | bytes | PathLike[str] | PathLike[bytes],
    follow: bool,
    look_up: Callable[[Node, bytes], tuple[Node | None, Attributes | None]],
    read_target: Callable[[Node], bytes],
) -> tuple[Node, bytes, Node | None, Attributes | None]: ...
