from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from coherence.table cimport Table
from server.changes cimport Changes
from server.data_files cimport DataFiles
from server.fuse.wire cimport fuse_attr, fuse_attr_out, fuse_entry_out
from server.handles cimport HandleTable
from server.inodes cimport InodeTable, inode_t
from server.libc cimport statx_t
from server.listings cimport Listings
from server.request cimport request_t
from server.validity cimport Validity

cdef enum:
    INTERRUPTED_MAX = 64

cdef enum dax_t:
    DAX_NEVER
    DAX_ALWAYS
    DAX_INODE
    DAX_AUTO

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
    cdef readonly Changes changes
    cdef readonly Validity validity
    cdef Listings listings
    cdef DataFiles data_files
    cdef readonly object window
    cdef object truncations
    cdef dax_t dax
    cdef uint64_t dax_min_size
    cdef bint woken
    cdef bint awaiting         # some request waits for the host watch
    cdef bint abandoning       # requests that are parked cannot wait for others: the loop does not go on meanwhile
    cdef bint opens_nothing
    cdef bint expects_new      # the next LOOKUP is expected to find an inode that is not known
    cdef uint64_t interrupted[INTERRUPTED_MAX]
    cdef unsigned interrupted_count
    cdef dict operations
    cdef int proc_fd
    cdef uint32_t file_flags, directory_flags
    cdef uint64_t counters[64]

    cdef int host_flags(self, int flags) noexcept
    cdef int reopen_fd(self, const inode_t *inode, int flags) noexcept
    cdef int path_fd(self, int fd) noexcept
    cdef int look_up(self, inode_t *parent, const char *name, inode_t **found, statx_t *stx) noexcept
    cdef int look_up_entry(self, inode_t *parent, const char *name, uint64_t ino, inode_t **found, statx_t *stx) noexcept
    cdef int adopt(self, int fd, inode_t **found, statx_t *stx) noexcept
    cdef void fill_attr(self, fuse_attr *attr, const statx_t *stx) noexcept
    cdef void fill_entry(
        self, fuse_entry_out *entry, inode_t *parent, inode_t *inode, const statx_t *stx, const char *name,
        size_t length
    ) noexcept
    cdef int fill_negative(self, fuse_entry_out *entry, inode_t *parent, const char *name, size_t length) noexcept
    cdef int fill_attr_out(self, fuse_attr_out *out, inode_t *inode, bint compared)
    cdef int file_fd(self, uint64_t nodeid, uint64_t fh, bint writable) noexcept
    cdef uint32_t flags_of(self, const inode_t *inode) noexcept
    cdef int hand_out(self, inode_t *inode, int fd, uint64_t *fh) noexcept
    cdef void hold(self, const statx_t *stx) noexcept
    cdef void evict(self, const statx_t *stx) noexcept
    cdef void interrupt(self, uint64_t unique) noexcept
    cdef int end(self, uint64_t unique)
    cdef int serve_rarely(self, request_t *request)
    cdef bint make_room(self) noexcept
    cdef bint awaits_watch(self, const inode_t *directory) noexcept
    cdef int reach(self, inode_t *inode, uint64_t size)
    cdef int begin_truncation(self, uint64_t unique, inode_t *inode, uint64_t size)
    cdef void end_truncation(self, uint64_t unique)
    cdef uint32_t attr_flags(self, inode_t *inode, const statx_t *stx) noexcept
    cdef void forget_request(self, uint64_t unique)
