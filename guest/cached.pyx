# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""Nodes and names that a guest keeps, the two rules that say whether they are good, and the way along a path.

The cache around them is in cache.py. This much is compiled, because a path whose names and attributes are kept
must cost next to nothing.

Everything kept was fetched by a request, and carries the *stamp* read before that request was sent. A change
has a later stamp than whatever was fetched before it. So a thing is good if nothing that it depends on changed
since its stamp. It depends on a *slot*: names on their name slot, all else on the inode's slot.

The two rules differ in who writes the slots. By `TableRule` it is everybody: the slots are those of the
domain's version table, and time plays no part. By `TimeRule` it is only this guest, for its own changes, and
others' changes are seen when the server's time to live is over, as in a Linux guest without a table.
"""

import errno
import os
import threading
import time

from libc.math cimport INFINITY
from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.coherence.shm.table cimport Table, vt_stamp, vt_valid
from coherent_vfs.server.host.libc cimport S_IFDIR, S_IFLNK, S_IFMT

FOREVER = INFINITY
MAX_SYMLINKS = 40

cdef enum:
    ROOT_ID = 1
    PRIVATE_SLOTS = 1 << 16


cdef class Rule:
    """Says whether a thing that was kept is still good.

    Attributes:
        aware: others' changes are seen at once, and time plays no part.
    """

    cdef readonly bint aware

    cpdef uint64_t stamp(self) except? 0:
        """To be read before the request is sent that fetches what will be kept."""
        raise NotImplementedError

    cpdef bint good(self, uint64_t slot, uint64_t stamp, double expiry) except -1:
        """Whether what depends on the slot, was fetched under the stamp and lives until then may be used."""
        raise NotImplementedError

    def changed(self, *slots):
        """This guest's own change, just acknowledged, was to what depends on these slots."""
        raise NotImplementedError

    def inode_slot(self, nodeid):
        """The slot of an inode."""
        raise NotImplementedError

    def name_slot(self, nodeid, name):
        """The slot of a name in a directory."""
        raise NotImplementedError


cdef class TableRule(Rule):
    """The domain's version table decides. The back-end has bumped it before it acknowledges a change."""

    cdef readonly Table table

    def __init__(self, Table table):
        self.table = table
        self.aware = True

    cpdef uint64_t stamp(self) except? 0:
        self.table.check_open()
        return vt_stamp(&self.table.vt)

    cpdef bint good(self, uint64_t slot, uint64_t stamp, double expiry) except -1:
        self.table.check_open()
        return vt_valid(&self.table.vt, slot, stamp)

    def changed(self, *slots):
        """Nothing to do: the slots are changed already."""

    def inode_slot(self, nodeid):
        return nodeid & (self.table.slot_count - 1)

    def name_slot(self, nodeid, name):
        return self.table.name_slot(nodeid & (self.table.slot_count - 1), name)


cdef class TimeRule(Rule):
    """Time decides, and a small table of this guest's own changes."""

    cdef uint64_t _slots[PRIVATE_SLOTS]
    cdef uint64_t _sequence
    cdef object _lock

    def __init__(self):
        self.aware = False
        self._lock = threading.Lock()

    cpdef uint64_t stamp(self) except? 0:
        return self._sequence

    cpdef bint good(self, uint64_t slot, uint64_t stamp, double expiry) except -1:
        if self._slots[slot % PRIVATE_SLOTS] > stamp:
            return False
        return expiry == INFINITY or <double>time.monotonic() < expiry

    def changed(self, *slots):
        with self._lock:
            self._sequence += 1
            for slot in slots:
                self._slots[<uint64_t>slot % PRIVATE_SLOTS] = self._sequence

    def inode_slot(self, nodeid):
        return nodeid % PRIVATE_SLOTS

    def name_slot(self, nodeid, name):
        return hash((nodeid, name)) % <object>PRIVATE_SLOTS


cdef class Attributes:
    """Attributes that were kept: as FUSE and as os.stat() have them. Expiry 0: not to be used again."""

    cdef readonly object attr
    cdef readonly object stat
    cdef readonly uint64_t stamp
    cdef readonly double expiry

    def __init__(self, attr, stat, uint64_t stamp, double expiry):
        self.attr = attr
        self.stat = stat
        self.stamp = stamp
        self.expiry = expiry


cdef class Node:
    """An inode that the server knows under a node id, as long as anything here refers to it.

    When the last reference goes, the lookups counted on it are put on the list of what to forget. So whatever
    uses a node id while it holds the Node cannot find it forgotten.

    Args:
        nodeid: the server's node id.
        slot: the slot of the inode.
        kind: the S_IFMT bits of the mode, which never change.
        forgotten: where (node id, number of lookups) goes in the end.
        dax: whether it is a file that is read and written through the window, which does not change.

    Attributes:
        outdated: its names are not to be kept: a node made anew would be another one (d_mark_dontcache in Linux).
    """

    cdef readonly uint64_t nodeid
    cdef readonly uint64_t slot
    cdef public uint32_t kind
    cdef public uint64_t lookups
    cdef readonly bint dax
    cdef public bint outdated
    cdef readonly dict names
    cdef public Attributes attributes
    cdef public object listing
    cdef public object target
    cdef readonly object generation
    cdef list _forgotten
    cdef object __weakref__

    def __init__(self, uint64_t nodeid, uint64_t slot, uint32_t kind, list forgotten, bint dax=False):
        self.nodeid = nodeid
        self.slot = slot
        self.kind = kind
        self.dax = dax
        self.names = {}
        self.generation = object()
        self._forgotten = forgotten

    def drop_pages(self):
        """Make the pages kept so far unreachable, also those that are on their way."""
        self.generation = object()

    def __del__(self):
        # No lock here: this may run in the middle of anything. list.append is atomic.
        if self.lookups and self.nodeid != ROOT_ID:
            self._forgotten.append((self.nodeid, self.lookups))


cdef class Name:
    """A name that was kept: of a node, or (None) of nothing."""

    cdef readonly Node directory
    cdef readonly bytes name
    cdef readonly Node node
    cdef readonly uint64_t slot
    cdef readonly uint64_t stamp
    cdef readonly double expiry
    cdef public bint recent

    def __init__(self, Node directory, bytes name, Node node, uint64_t slot, uint64_t stamp, double expiry):
        self.directory = directory
        self.name = name
        self.node = node
        self.slot = slot
        self.stamp = stamp
        self.expiry = expiry


cdef class Hits:
    """How often something that was kept answered in place of a request."""

    cdef public uint64_t names
    cdef public uint64_t attributes
    cdef public uint64_t listings
    cdef public uint64_t targets
    cdef public uint64_t pages

    def __repr__(self):
        return (
            f"Hits(names={self.names}, attributes={self.attributes}, listings={self.listings}, "
            f"targets={self.targets}, pages={self.pages})"
        )


def cached_attributes(Node node, Rule rule, Hits hits):
    """A node's attributes if they are good, or None."""
    cdef Attributes kept = node.attributes
    if kept is None or kept.expiry == 0.0 or not rule.good(node.slot, kept.stamp, kept.expiry):
        return None
    hits.attributes += 1
    return kept


def walk(Node root, Rule rule, Hits hits, path, bint follow, look_up, read_target):
    """Find where a path leads; its last name need not exist.

    Args:
        root: where it begins, whatever it begins with.
        rule, hits: say which names are good, and count them.
        path: str, bytes or path-like.
        follow: a link at the end is followed.
        look_up: (directory, name) to (node or None, Attributes or None), for names that are not kept.
        read_target: node of a link to its target.

    Returns:
        (directory, name, node, attributes) as tree.Place has them.
    """
    cdef list pending = split(path)
    cdef list above = []
    cdef Node node = root, directory = root, child
    cdef Name kept
    cdef bytes name, target, last = b""
    cdef Attributes fetched = None
    cdef int links = 0
    while pending:
        name = pending.pop()
        if node is None:
            raise error_of(errno.ENOENT)
        if node.kind != S_IFDIR:
            raise error_of(errno.ENOTDIR)
        if not name or name == b".":
            last = b""
            continue
        if name == b"..":
            node = above.pop() if above else root
            directory, last, fetched = node, b"", None
            continue
        kept = node.names.get(name)
        if kept is not None and rule.good(kept.slot, kept.stamp, kept.expiry):
            kept.recent = True
            hits.names += 1
            child, fetched = kept.node, None
        else:
            child, fetched = look_up(node, name)
        if child is not None and child.kind == S_IFLNK and (follow or pending):
            links += 1
            if links > MAX_SYMLINKS:
                raise error_of(errno.ELOOP)
            target = read_target(child)
            if target.startswith(b"/"):
                node = root
                above = []
            pending.extend(split(target))
            directory, last, fetched = node, b"", None
            continue
        above.append(node)
        directory, last, node = node, name, child
    return directory, last, node, fetched


cdef list split(path):
    """The names of a path, last first. Empty ones, beside slashes, mean the same as "."."""
    cdef bytes raw = os.fsencode(path)
    cdef list names
    if not raw:
        raise error_of(errno.ENOENT)
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    names = raw.split(b"/")
    names.reverse()
    return names


cdef error_of(code):
    return OSError(code, os.strerror(code))
