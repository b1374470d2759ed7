# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""What a host watch tells the domain; see domain.pyi.

Compiled: between a change and its bump Python's own code is felt, as it leaves the processor's caches while nothing
happens.
"""

from typing import Literal

from coherent_vfs.coherence.shm.table cimport Table, vt_bump, vt_is_root, vt_name_slot
from libc.stdint cimport uint64_t

What = Literal["create", "delete", "modify", "attrib", "move from", "move to"]
HOST = "host"

cdef uint64_t ROOT_SLOT = 1


cdef class Counts:
    pass


cdef class Domain:
    def __init__(self, Table table not None, leases, raise_floor):
        self.table = table
        self.leases = leases
        self.raise_floor = raise_floor
        self.counts = Counts()
        self.on_data = lambda slot: None
        self.on_change = None

    def bump(self, names, inodes):
        for directory, name in names:
            self.bump_name(directory, name)
        for slot, data in inodes.items():
            self.bump_inode(slot, data)

    def end_watch_epoch(self, reason):
        # The marks first: what is fetched after the floor was raised must not rely on an old one.
        self.leases.end_watch_epoch()
        self.raise_floor(reason)

    cdef int bump_name(self, uint64_t directory, bytes name) except -1:
        cdef const char *text = name
        self.bump_slot(vt_name_slot(&self.table.vt, directory, text, len(name)), False)
        if vt_is_root(&self.table.vt, directory):
            self.bump_slot(vt_name_slot(&self.table.vt, ROOT_SLOT, text, len(name)), False)
        return 0

    cdef int bump_inode(self, uint64_t slot, bint data) except -1:
        self.bump_slot(slot, data)
        if vt_is_root(&self.table.vt, slot):
            self.bump_slot(ROOT_SLOT, data)
        if data:
            self.on_data(slot)
        return 0

    cdef int bump_slot(self, uint64_t slot, bint data) except -1:
        self.table.check_writable()
        self.leases.changed(slot, data)
        vt_bump(&self.table.vt, slot)
        return 0
