"""The share as a tree of nodes: paths, names, attributes and listings, through the guest's cache."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from coherent_vfs.guest.cache import Cache, Listing, Target
from coherent_vfs.guest.cached import FOREVER, Attributes, Node, Rule, cached_attributes, walk
from coherent_vfs.guest.dax import Dax
from coherent_vfs.guest.fuse_client import DirectoryEntry, Entry, FuseClient
from coherent_vfs.server.fuse.protocol import InitFlag, OpenFlag

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

MAX_NAME: Final = 4095
DIRECTORY_BYTES: Final = 64 * 1024


class Place(NamedTuple):
    """Where a path leads: a name in a directory, and the node found there, if any.

    The name is empty where the path ends in the root, "." or "..". The attributes are those that a LOOKUP on
    the way has just brought; None where the cache had the name.
    """

    directory: Node
    name: bytes
    node: Node | None
    fetched: Attributes | None


class Tree:
    """Finds nodes and what is known of them, asking the server for what is not kept or no longer good.

    Every method raises OSError with the right errno, but without the path.

    Args:
        client: the FUSE session.
        rule: what says how long things are good.
        max_names: names to keep at most.
        max_pages: pages to keep at most.
        dax: the files in the guest's window; None for a guest that has none.
    """

    def __init__(
        self, client: FuseClient, rule: Rule, *, max_names: int, max_pages: int, dax: Dax | None = None
    ) -> None:
        self.client = client
        self.rule = rule
        self.dax = dax
        self.cache = Cache(
            rule,
            client.forgotten,
            max_names=max_names,
            max_pages=max_pages,
            auto_inval=InitFlag.AUTO_INVAL_DATA in client.flags,
            dax=(lambda _: False) if dax is None else dax.enabled,
        )

    # --- paths -----------------------------------------------------------------------------------

    def walk(self, path: Path, *, follow: bool = True) -> Place:
        """Find where a path leads; its last name need not exist. `follow`: a link there is followed."""
        return Place(*walk(self.cache.root, self.rule, self.cache.hits, path, follow, self.look_up, self.target))

    def find(self, path: Path, *, follow: bool = True) -> tuple[Node, Attributes | None]:
        """The node that a path leads to, and its attributes if a LOOKUP has just brought them."""
        place = self.walk(path, follow=follow)
        if place.node is None:
            raise _error(errno.ENOENT)
        return place.node, place.fetched

    def look_up(self, directory: Node, name: bytes) -> tuple[Node | None, Attributes | None]:
        """Ask for a name in a directory: the node, None if there is none, and its attributes."""
        if len(name) > MAX_NAME:
            raise _error(errno.ENAMETOOLONG)
        stamp = self.rule.stamp()
        try:
            entry = self.client.lookup(directory.nodeid, name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            self.cache.keep_name(directory, name, None, 0, stamp)
            return None, None
        return self.keep_entry(directory, name, entry, stamp)

    def keep_entry(
        self, directory: Node, name: bytes, entry: Entry, stamp: int
    ) -> tuple[Node | None, Attributes | None]:
        """Keep a reply that names an inode; the stamp was read before its request was sent."""
        node, attributes = self.cache.found(entry, stamp) if entry.nodeid else (None, None)
        self.cache.keep_name(directory, name, node, entry.entry_ttl, stamp)
        return node, attributes

    def changed_name(self, directory: Node, name: bytes, *others: Node | None) -> None:
        """Note this guest's own change of a name, its directory, and other nodes."""
        self.rule.changed(
            self.rule.name_slot(directory.nodeid, name),
            directory.slot,
            *(node.slot for node in others if node is not None),
        )

    # --- nodes -----------------------------------------------------------------------------------

    def attributes(self, node: Node, fh: int | None = None) -> Attributes:
        """A node's attributes."""
        kept = cached_attributes(node, self.rule, self.cache.hits)
        if kept is None:
            stamp = self.rule.stamp()
            ttl, attr = self.client.getattr(node.nodeid, fh)
            kept = self.cache.keep_attributes(node, attr, ttl, stamp)
        return kept

    def size(self, node: Node, fh: int | None = None) -> int:
        """Up to where an access to a node through the window may go, bytes.

        By time that is what the last reply said, however old, as Linux's i_size.
        """
        kept = node.attributes
        if self.rule.aware or kept is None or not self.rule.good(node.slot, kept.stamp, FOREVER):
            kept = self.attributes(node, fh)
        return int(kept.attr.size)

    def set_attributes(
        self,
        node: Node,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        times_ns: tuple[int | None, int | None] | None = None,
        fh: int | None = None,
    ) -> None:
        """Change what is given, as FuseClient.setattr()."""
        try:
            self.client.setattr(node.nodeid, mode=mode, uid=uid, gid=gid, size=size, times_ns=times_ns, fh=fh)
        finally:
            self.rule.changed(node.slot)

    def target(self, node: Node) -> bytes:
        """A symbolic link's target."""
        path = self.cache.target(node)
        if path is None:
            stamp = self.rule.stamp()
            path = self.client.readlink(node.nodeid)
            # Without a table, Linux keeps targets only where the server says that they do not change.
            if self.rule.aware or InitFlag.CACHE_SYMLINKS in self.client.flags:
                node.target = Target(path, stamp)
        return path

    def entries(self, node: Node, *, plus: bool) -> tuple[DirectoryEntry, ...]:
        """A directory's entries; plus: fetch and keep what is behind the names as well."""
        kept = self.cache.listing(node) if self.rule.aware else None
        if kept is not None:
            return kept.entries
        stamp = self.rule.stamp()
        opened = self.client.opendir(node.nodeid)
        try:
            mtime_ns = 0
            if OpenFlag.CACHE_DIR in opened.flags and not self.rule.aware:
                mtime_ns = self.attributes(node).stat.st_mtime_ns
                kept = self.cache.listing(node) if OpenFlag.KEEP_CACHE in opened.flags else None
                if kept is not None and kept.mtime_ns == mtime_ns:
                    return kept.entries
            read = self._read_plus if plus else self._read
            entries = tuple(read(node, opened.fh))
        finally:
            self.client.releasedir(node.nodeid, opened.fh)
        if OpenFlag.CACHE_DIR in opened.flags:
            node.listing = Listing(entries, mtime_ns, stamp)
        return entries

    def _read(self, node: Node, fh: int) -> list[DirectoryEntry]:
        entries: list[DirectoryEntry] = []
        size = min(DIRECTORY_BYTES, self.client.max_read)
        while some := self.client.readdir(node.nodeid, fh, entries[-1].offset if entries else 0, size):
            entries += some
        return entries

    def _read_plus(self, node: Node, fh: int) -> list[DirectoryEntry]:
        entries: list[DirectoryEntry] = []
        size = min(DIRECTORY_BYTES, self.client.max_read)
        while True:
            stamp = self.rule.stamp()
            offset = entries[-1].offset if entries else 0
            some = self.client.readdirplus(node.nodeid, fh, offset, size)
            if not some:
                return entries
            for entry, directory_entry in some:
                if entry.nodeid and directory_entry.name not in (b".", b".."):
                    self.keep_entry(node, directory_entry.name, entry, stamp)
                entries.append(directory_entry)


def named(error: OSError, path: Path, other: Path | None = None) -> OSError:
    """The same error with the path that it is about, or both paths."""
    second = None if other is None else os.fspath(other)
    return OSError(error.errno, error.strerror, os.fspath(path), None, second)


class Naming:
    """A with block whose OSErrors name the path that it is about, or both paths."""

    __slots__ = ("_other", "_path")

    def __init__(self, path: Path, other: Path | None = None) -> None:
        self._path = path
        self._other = other

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            raise named(error, self._path, self._other) from error


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
