from libc.stddef cimport size_t

from coherent_vfs.server.fuse.wire cimport fuse_attr_out, fuse_entry_out
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.host.libc cimport statx_t
from coherent_vfs.server.dax.mapped_files cimport MappedFiles
from coherent_vfs.server.caching.validity cimport Validity

cdef class Replies:
    cdef Validity validity
    cdef MappedFiles mapped
    cdef bint writeback

    cdef void fill_entry(
        self, fuse_entry_out *entry, inode_t *parent, inode_t *inode, const statx_t *stx, const char *name,
        size_t length
    ) noexcept
    cdef int fill_negative(self, fuse_entry_out *entry, inode_t *parent, const char *name, size_t length) noexcept
    cdef int fill_attr_out(self, fuse_attr_out *out, inode_t *inode, bint compared)
