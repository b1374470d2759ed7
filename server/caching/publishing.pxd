from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.coherence.shm.leases cimport Leases, lb_t
from coherent_vfs.coherence.shm.table cimport Journal, Table
from coherent_vfs.server.passthrough.inode_table cimport inode_t

cdef enum:
    PARK = -2        # of an operation: not now, see Changes.due
    NAMES_MAX = 4    # a RENAME between two roots of shares
    SLOTS_MAX = 16   # the same: four names, two directories, slot 1, and two inodes, before and after
    THINGS_MAX = 8   # the same without what has a second slot

cdef struct change_t:
    uint64_t slots[SLOTS_MAX]       # names first
    uint64_t seen[NAMES_MAX]        # the names' slots as they were at the beginning
    uint64_t root_epoch             # of the table at the beginning
    unsigned names
    unsigned count
    uint64_t things[THINGS_MAX]     # hashes
    bint data[THINGS_MAX]           # whether a file's data or a directory's list changes
    unsigned thing_count
    inode_t *known[THINGS_MAX]      # inodes whose data changes and that the guest knows
    bint current[THINGS_MAX]        # whether the guest had nothing older before
    bint list_current[THINGS_MAX]   # whether the list that it had was not older
    unsigned known_count
    lb_t *locked[THINGS_MAX]        # buckets of the lease table
    uint64_t mine[THINGS_MAX]       # their lock words
    uint64_t before[THINGS_MAX]     # the same before
    unsigned locked_count

cdef class Publisher:
    cdef Table table
    cdef Journal journal
    cdef Leases leases
    cdef uint64_t due
    cdef uint64_t stamp
    cdef uint64_t number, first
    cdef bint leased
    cdef public bint abandoning   # requests wait for leases at the most: the front-end has the device stop
    cdef readonly uint64_t held

    cdef int put_off(self, uint64_t due) noexcept
    cdef void add_name(self, change_t *change, uint64_t dir_slot, const char *name, size_t length) noexcept
    cdef void add_inode(self, change_t *change, uint64_t hash, bint data) noexcept
    cdef void add_known(self, change_t *change, inode_t *inode, bint data) noexcept
    cdef int begin(self, change_t *change) noexcept
    cdef void commit(self, change_t *change) noexcept
    cdef void abort(self, change_t *change, int error) noexcept
