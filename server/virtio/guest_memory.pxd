from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

cdef struct region_t:
    uint64_t guest_addr
    uint64_t size
    uint64_t user_addr
    char *host
    char *map_base
    size_t map_size
    int guard              # the number of its range in sigbus.h

cdef class GuestMemory:
    cdef region_t *regions
    cdef int count
    cdef bint is_lost(self) noexcept
    cdef char *translate(self, uint64_t guest_addr, uint64_t length, uint64_t *available) noexcept
    cdef char *translate_user(self, uint64_t user_addr, uint64_t length) noexcept
