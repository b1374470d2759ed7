from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from coherent_vfs.server.virtio.guest_memory cimport GuestMemory

cdef enum:
    MAX_IOV = 1024

cdef struct desc_t:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next

cdef struct used_elem_t:
    uint32_t id
    uint32_t len

cdef class Virtqueue:
    cdef readonly GuestMemory memory
    cdef readonly bint event_idx
    cdef readonly bint broken
    cdef uint64_t desc_addr, avail_addr, used_addr
    cdef desc_t *desc
    cdef uint16_t *avail
    cdef uint16_t *used
    cdef uint16_t size
    cdef uint16_t next_avail, next_used, signalled_used
    cdef bint never_signalled
    # The chain that pop() found.
    cdef uint16_t head
    cdef iovec *readable
    cdef iovec *writable
    cdef int n_readable, n_writable
    cdef size_t readable_size, writable_size

    cdef int pop(self) noexcept
    cdef bint is_broken(self) noexcept
    cdef int walk(self, uint16_t head) noexcept
    cdef int add_segment(self, uint64_t addr, uint32_t length, bint writable) noexcept
    cdef void push(self, uint32_t written) noexcept
    cdef bint must_signal(self) noexcept
    cdef void suppress_kicks(self) noexcept
    cdef bint enable_kicks(self) noexcept
