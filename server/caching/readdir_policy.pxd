from libc.stdint cimport uint32_t, uint64_t

from coherent_vfs.server.passthrough.inode_table cimport inode_t

cdef class Listings:
    cdef bint shared
    cdef bint chooses          # what a stock guest in shared does
    cdef uint64_t span         # microseconds that leases which come with a list are good for
    cdef uint64_t opened       # node id of the directory that the guest opened last
    cdef bint probes           # the list that is being read is to have a probe
    cdef bint awaits           # there is one that nobody has asked for yet
    cdef unsigned unanswered   # probes in a row that nobody asked for before the next list was read
    cdef unsigned rests        # lists to come without one

    cdef uint32_t open(self, inode_t *inode, uint32_t flags) noexcept
    cdef void looked_up(self, inode_t *parent, const inode_t *inode) noexcept
    cdef bint brings(self, const inode_t *inode) noexcept
    cdef void begin(self, inode_t *inode) noexcept
    cdef bint tries(self, inode_t *parent, uint64_t ino, unsigned type) noexcept
