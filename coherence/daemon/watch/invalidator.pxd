# cython: language_level=3
"""The domain for the other compiled part of the host watch."""

from libc.stdint cimport uint64_t

from coherent_vfs.coherence.shm.table cimport Table


cdef class Counts:
    cdef public long events, bumped, own, gone, overflows, refused


cdef class Domain:
    cdef readonly Table table
    cdef readonly object leases
    cdef readonly object raise_floor
    cdef readonly Counts counts
    cdef public object on_data
    cdef public object on_change

    cdef int bump_name(self, uint64_t directory, bytes name) except -1
    cdef int bump_inode(self, uint64_t slot, bint data) except -1
    cdef int bump_slot(self, uint64_t slot, bint data) except -1
