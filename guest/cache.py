"""What a guest keeps: names, attributes, listings, link targets and pages, bounded; kept.pyx says how long."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from coherent_vfs.guest.cached import FOREVER, Attributes, Hits, Name, Node, Rule
from coherent_vfs.guest.fuse_client import DirectoryEntry, Entry
from coherent_vfs.server.fuse.protocol import ROOT_ID, Attr

PAGE_SIZE: Final = 4096


class Listing(NamedTuple):
    """A whole directory that was kept, with the modification time that it belongs to."""

    entries: tuple[DirectoryEntry, ...]
    mtime_ns: int
    stamp: int


class Target(NamedTuple):
    """A symbolic link's target that was kept."""

    path: bytes
    stamp: int


class Page(NamedTuple):
    """PAGE_SIZE bytes of a file that were kept, or fewer at its end."""

    data: bytes
    stamp: int


class Cache:
    """The nodes, names, attributes, listings and pages of one guest. Several threads may use it.

    Args:
        rule: says what is still good.
        forgotten: where nodes that nothing refers to any more are put.
        max_names: names to keep at most.
        max_pages: pages to keep at most.
        auto_inval: drop a file's pages when its modification time turns out to have changed.
        dax: whether a file with these attributes is read and written through the window; it has no pages here.
    """

    def __init__(
        self,
        rule: Rule,
        forgotten: list[tuple[int, int]],
        *,
        max_names: int = 65536,
        max_pages: int = 16384,
        auto_inval: bool = True,
        dax: Callable[[Attr], bool] = lambda _: False,
    ) -> None:
        self.rule = rule
        self.hits = Hits()
        self.auto_inval = auto_inval
        self.root = Node(ROOT_ID, rule.inode_slot(ROOT_ID), 0o040000, forgotten)
        self._forgotten = forgotten
        self._dax = dax
        self._max_names = max_names
        self._max_pages = max_pages
        self._lock = threading.Lock()
        self._nodes: WeakValueDictionary[int, Node] = WeakValueDictionary({ROOT_ID: self.root})
        self._names: OrderedDict[Name, None] = OrderedDict()
        self._pages: OrderedDict[tuple[object, int], Page] = OrderedDict()

    # --- nodes and names -------------------------------------------------------------------------

    def found(self, entry: Entry, stamp: int) -> tuple[Node, Attributes]:
        """The node of a positive reply, with the lookup counted, and its attributes, kept."""
        with self._lock:
            node = self._nodes.get(entry.nodeid)
            kind = entry.attr.mode & 0o170000
            if node is None:
                slot = self.rule.inode_slot(entry.nodeid)
                node = Node(entry.nodeid, slot, kind, self._forgotten, self._dax(entry.attr))
                self._nodes[entry.nodeid] = node
            node.lookups += 1
            node.kind = kind
        return node, self.keep_attributes(node, entry.attr, entry.attr_ttl, stamp)

    def keep_name(self, directory: Node, name: bytes, node: Node | None, ttl: float, stamp: int) -> None:
        """Keep that a name is a node's, or nothing's, and drop what was kept of it."""
        with self._lock:
            old = directory.names.pop(name, None)
            if old is not None:
                self._names.pop(old, None)
            if ttl <= 0 or (node is not None and node.outdated):
                return
            slot = self.rule.name_slot(directory.nodeid, name)
            kept = Name(directory, name, node, slot, stamp, time.monotonic() + ttl)
            directory.names[name] = kept
            self._names[kept] = None
            while len(self._names) > self._max_names:
                self._evict_name()

    def _keep_no_name_of(self, node: Node) -> None:
        with self._lock:
            node.outdated = True
            for kept in [kept for kept in self._names if kept.node is node]:
                del self._names[kept]
                if kept.directory.names.get(kept.name) is kept:
                    del kept.directory.names[kept.name]

    def _evict_name(self) -> None:
        # Second chance: what was used since it came to this end goes round once more.
        kept, _ = self._names.popitem(last=False)
        if kept.recent:
            kept.recent = False
            self._names[kept] = None
        elif kept.directory.names.get(kept.name) is kept:
            del kept.directory.names[kept.name]

    # --- attributes, listings, targets -----------------------------------------------------------

    def keep_attributes(self, node: Node, attr: Attr, ttl: float, stamp: int) -> Attributes:
        """Keep a node's attributes, and drop its pages where they must be of another content."""
        old = node.attributes
        if old is not None and (
            old.attr.size != attr.size
            or (self.auto_inval and (old.attr.mtime, old.attr.mtimensec) != (attr.mtime, attr.mtimensec))
        ):
            node.drop_pages()
        if self._dax(attr) != node.dax and not node.outdated:
            # The next node of this file will be right, when nobody has it open any more (fuse_dax_dontcache).
            self._keep_no_name_of(node)
        expiry = time.monotonic() + ttl if ttl > 0 else 0.0
        # What may not be kept (expiry 0) is remembered all the same, to compare the next with.
        kept = Attributes(attr, stat_result(attr), stamp, expiry)
        node.attributes = kept
        return kept

    def listing(self, node: Node) -> Listing | None:
        """A directory's entries, if they are good."""
        kept = node.listing
        if kept is None or not self.rule.good(node.slot, kept.stamp, FOREVER):
            return None
        self.hits.listings += 1
        return kept

    def target(self, node: Node) -> bytes | None:
        """A symbolic link's target, if it is good."""
        kept = node.target
        if kept is None or not self.rule.good(node.slot, kept.stamp, FOREVER):
            return None
        self.hits.targets += 1
        return kept.path

    # --- pages -----------------------------------------------------------------------------------

    def page(self, node: Node, index: int) -> bytes | None:
        """Page `index` of a file, if it is good."""
        kept = self._pages.get((node.generation, index))
        if kept is None or not self.rule.good(node.slot, kept.stamp, FOREVER):
            return None
        self.hits.pages += 1
        return kept.data

    def keep_pages(self, generation: object, index: int, data: bytes, asked: int, stamp: int) -> None:
        """Keep what a READ brought.

        Args:
            generation: the node's generation when the request was sent.
            index: the first page.
            data: the reply.
            asked: how much was asked for, whole pages; less came because the file ends there.
            stamp: read before the request was sent.
        """
        with self._lock:
            for at in range(0, asked, PAGE_SIZE):
                key = (generation, index + at // PAGE_SIZE)
                self._pages[key] = Page(data[at : at + PAGE_SIZE], stamp)
                self._pages.move_to_end(key)
                if at + PAGE_SIZE > len(data):
                    break
            while len(self._pages) > self._max_pages:
                self._pages.popitem(last=False)

    def drop(self) -> None:
        """Drop everything, as `echo 3 > /proc/sys/vm/drop_caches` does."""
        with self._lock:
            self._pages.clear()
            names, self._names = self._names, OrderedDict()
            for kept in names:
                kept.directory.names.clear()
        self.root.attributes = self.root.listing = None
        for node in list(self._nodes.values()):
            node.attributes = node.listing = node.target = None


def stat_result(attr: Attr) -> os.stat_result:
    """Attributes as os.stat() has them; the device is 0, as FUSE does not tell."""
    times = (
        (attr.atime, attr.atimensec),
        (attr.mtime, attr.mtimensec),
        (attr.ctime, attr.ctimensec),
    )
    return os.stat_result(
        (
            attr.mode,
            attr.ino,
            0,
            attr.nlink,
            attr.uid,
            attr.gid,
            attr.size,
            attr.atime,
            attr.mtime,
            attr.ctime,
            *(seconds + 1e-9 * nanoseconds for seconds, nanoseconds in times),
            *(seconds * 1_000_000_000 + nanoseconds for seconds, nanoseconds in times),
            attr.blksize,
            attr.blocks,
            decode_device(attr.rdev),
        )
    )


def decode_device(rdev: int) -> int:
    """A device number of 32 bits, as FUSE has it, as os.makedev() has it."""
    return os.makedev((rdev & 0xFFF00) >> 8, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00))


def encode_device(device: int) -> int:
    """The reverse of decode_device()."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
