from libc.stdint cimport uint64_t

from coherent_vfs.server.passthrough.inode_table cimport InodeTable, inode_t
from coherent_vfs.server.host.libc cimport statx_t


cdef class Lookups:
    cdef InodeTable inodes
    cdef bint writeback
    cdef bint expects_new      # the next LOOKUP is expected to find an inode that is not known
    cdef int proc_fd

    cdef int look_up(self, inode_t *parent, const char *name, inode_t **found, statx_t *stx) noexcept
    cdef int look_up_entry(self, inode_t *parent, const char *name, uint64_t ino, inode_t **found, statx_t *stx) noexcept
    cdef int look_up_itself(self, uint64_t nodeid, inode_t **found, statx_t *stx) noexcept
    cdef int look_up_parent(self, uint64_t nodeid, inode_t **found, statx_t *stx) noexcept
    cdef int adopt(self, int fd, inode_t **found, statx_t *stx) noexcept
    cdef int host_flags(self, int flags) noexcept
    cdef int reopen_fd(self, const inode_t *inode, int flags) noexcept
    cdef int path_fd(self, int fd) noexcept
    cdef void hold(self, const statx_t *stx) noexcept
    cdef void release(self, const statx_t *stx) noexcept
