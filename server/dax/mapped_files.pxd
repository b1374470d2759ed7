from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.server.caching.publishing cimport Publisher
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport statx_t
from coherent_vfs.server.passthrough.lookup cimport Lookups
from coherent_vfs.server.caching.validity cimport Validity

cdef enum dax_t:
    DAX_NEVER
    DAX_ALWAYS
    DAX_INODE
    DAX_AUTO

cdef class MappedFiles:
    cdef object settings
    cdef Lookups lookups
    cdef Publisher publisher
    cdef Validity validity
    cdef readonly object window
    cdef object truncations
    cdef dax_t dax
    cdef uint64_t dax_min_size

    cdef uint32_t attr_flags(self, inode_t *inode, const statx_t *stx) noexcept
    cdef int reach(self, inode_t *inode, uint64_t size)
    cdef int begin_truncation(self, uint64_t unique, inode_t *inode, uint64_t size)
    cdef int confirm_truncation(self, uint64_t unique)
    cdef void end_truncation(self, uint64_t unique)
    cdef void forget_request(self, uint64_t unique)
    cdef int end_session(self, uint64_t unique)
