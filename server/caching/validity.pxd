from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from coherent_vfs.coherence.shm.leases cimport Leases
from coherent_vfs.coherence.shm.table cimport Table
from coherent_vfs.server.caching.publishing cimport Publisher
from coherent_vfs.server.fuse.wire cimport fuse_attr
from coherent_vfs.server.passthrough.inode_table cimport inode_t, watch_t
from coherent_vfs.server.host.libc cimport statx_t

cdef class Validity:
    cdef Table table
    cdef Leases leases
    cdef Publisher publisher
    cdef bint shared
    cdef bint aware
    cdef uint64_t fixed
    cdef uint64_t lease_max, lease_margin
    cdef uint64_t stamp
    cdef uint64_t reported_by
    cdef uint64_t epoch        # of the host watch
    cdef uint64_t granted_at
    cdef bint granted
    cdef object watcher
    cdef public int64_t clock_step
    cdef public bint maps      # the guest maps files
    cdef readonly uint64_t given

    cdef void begin_request(self) noexcept
    cdef void end_change(self) noexcept
    cdef bint too_late(self) noexcept
    cdef void ask_watch(self, inode_t *inode) noexcept
    cdef bint awaits_watch(self, const inode_t *inode) noexcept
    cdef void watch_via_parent(self, const inode_t *parent, inode_t *inode, const statx_t *stx) noexcept
    cdef uint64_t of_name(
        self, inode_t *parent, const char *name, size_t length, int64_t born_sec, int64_t born_nsec
    ) noexcept
    cdef uint64_t of_attributes(self, inode_t *inode, const statx_t *stx) noexcept
    cdef bint tell(self, inode_t *inode, const statx_t *stx, fuse_attr *attr, bint compared) noexcept
    cdef bint is_watched(self, const inode_t *inode) noexcept
    cdef bint is_stale(self, const inode_t *inode) noexcept
    cdef void force_invalidation(self, inode_t *inode) noexcept
