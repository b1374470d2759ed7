from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from coherence.table cimport Journal, Table
from server.fuse.wire cimport fuse_attr, fuse_entry_out
from server.handles cimport HandleTable
from server.inodes cimport InodeTable, inode_t
from server.libc cimport statx_t
from server.request cimport request_t

cdef enum:
    NAMES_MAX = 4    # a RENAME between two roots of shares
    SLOTS_MAX = 16   # the same: four names, two directories, slot 1, and two inodes, before and after

cdef struct change_t:
    uint64_t slots[SLOTS_MAX]    # names first
    uint64_t seen[NAMES_MAX]   # the names' slots as they were at the beginning
    uint64_t roots             # how many roots the table had at the beginning
    unsigned names
    unsigned count

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
    cdef Journal journal
    cdef dict operations
    cdef int proc_fd
    cdef uint64_t valid
    cdef uint32_t valid_nsec
    cdef uint32_t file_flags, directory_flags
    cdef uint64_t counters[64]

    cdef int host_flags(self, int flags) noexcept
    cdef int reopen_fd(self, const inode_t *inode, int flags) noexcept
    cdef int path_fd(self, int fd) noexcept
    cdef int look_up(self, inode_t *parent, const char *name, inode_t **found, statx_t *stx) noexcept
    cdef int look_up_entry(self, inode_t *parent, const char *name, uint64_t ino, inode_t **found, statx_t *stx) noexcept
    cdef int adopt(self, int fd, inode_t **found, statx_t *stx) noexcept
    cdef void fill_attr(self, fuse_attr *attr, const statx_t *stx) noexcept
    cdef void fill_entry(self, fuse_entry_out *entry, const inode_t *inode, const statx_t *stx) noexcept
    cdef void change_name(self, change_t *change, const inode_t *parent, const char *name, size_t length) noexcept
    cdef void change_inode(self, change_t *change, uint64_t slot) noexcept
    cdef void announce(self, change_t *change) noexcept
    cdef void acknowledge(self, change_t *change) noexcept
    cdef void withdraw(self, change_t *change, int error) noexcept
    cdef int serve_rarely(self, request_t *request)
    cdef bint make_room(self) noexcept
