from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.coherence.shm.table cimport Table
from coherent_vfs.server.caching.publishing cimport Publisher
from coherent_vfs.server.passthrough.implicit_handles cimport DataFiles
from coherent_vfs.server.passthrough.handle_table cimport HandleTable, handle_t
from coherent_vfs.server.passthrough.inode_table cimport InodeTable, inode_t
from coherent_vfs.server.host.libc cimport statx_t
from coherent_vfs.server.caching.readdir_policy cimport Listings
from coherent_vfs.server.passthrough.lookup cimport Lookups
from coherent_vfs.server.dax.mapped_files cimport MappedFiles
from coherent_vfs.server.session.replies cimport Replies
from coherent_vfs.server.caching.validity cimport Validity

cdef enum:
    INTERRUPTED_MAX = 64

cdef class FileSystem:
    cdef readonly object settings
    cdef readonly bint readonly
    cdef readonly bint xattr
    cdef readonly bint writeback
    cdef readonly bint allow_direct_io
    cdef readonly bint initialized
    cdef readonly bint aware
    cdef readonly InodeTable inodes
    cdef readonly HandleTable handles
    cdef Table table
    cdef readonly Publisher publisher
    cdef readonly Validity validity
    cdef Listings listings
    cdef Lookups lookups
    cdef readonly MappedFiles mapped
    cdef Replies replies
    cdef DataFiles data_files
    cdef bint woken
    cdef bint awaiting         # some request waits for the host watch
    cdef bint opens_nothing
    cdef bint guest_strips_sgid
    cdef uint64_t interrupted[INTERRUPTED_MAX]
    cdef unsigned interrupted_count
    cdef uint32_t file_flags, directory_flags
    cdef uint64_t counters[64]

    cdef int open_file(self, uint64_t nodeid, uint64_t fh, bint writable, handle_t **file) noexcept
    cdef uint32_t flags_of(self, const inode_t *inode) noexcept
    cdef int hand_out(self, inode_t *inode, int fd, int flags, uint64_t *fh) noexcept
    cdef void name_removed(self, const statx_t *stx) noexcept
    cdef void make_space(self) noexcept
    cdef void interrupt(self, uint64_t unique) noexcept
    cdef int end(self, uint64_t unique)
    cdef bint awaits_watch(self, const inode_t *directory) noexcept
