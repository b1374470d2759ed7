from libc.stdint cimport uint64_t

from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.passthrough.inode_table cimport inode_t

cdef enum:
    MOST = 1024

cdef struct kept_t:
    inode_t *inode
    uint64_t nodeid
    uint64_t fh

cdef class DataFiles:
    cdef HandleTable handles
    cdef kept_t kept[MOST]
    cdef unsigned count, capacity
    cdef uint64_t uses, uses_at_tick

    cdef handle_t *find(self, inode_t *inode, bint writable) noexcept
    cdef handle_t *keep(self, inode_t *inode, int fd, int flags) noexcept
    cdef void drop(self, inode_t *inode) noexcept
    cdef void unlinked(self, inode_t *inode) noexcept
    cdef void expire(self) noexcept
    cdef void clear(self) noexcept
