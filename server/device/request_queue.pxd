from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport request_t
from coherent_vfs.server.virtio.virtqueue cimport Virtqueue

cdef struct parked_t:
    uint16_t head          # of its chain, which the driver gets back when it is served
    uint64_t unique
    uint64_t due           # when to try again; CLOCK_MONOTONIC, nanoseconds
    bint held              # whether leases have kept it waiting
    bint full              # whether it waits as the share was full

cdef class RequestQueue:
    cdef readonly Virtqueue ring
    cdef readonly int kick_fd
    cdef FileSystem fs
    cdef object on_broken
    cdef int call_fd, err_fd
    cdef bint enabled
    cdef bint drain
    cdef bint patient
    cdef bint polling
    cdef bint ready
    cdef uint32_t unsignalled
    cdef uint64_t last_tick
    cdef uint16_t avail_at_tick
    cdef request_t *request
    cdef parked_t *waiting
    cdef int parked_count
    cdef bint woken        # what is parked is to be looked at, whenever it is due
    cdef bint last_try     # the request that is served is not to wait for space
    cdef bint full         # the one that was served does
    cdef int error         # the errno in the last reply
    cdef bint tracing      # each request is logged

    cdef void kicked(self) noexcept
    cdef int process(self) except -1
    cdef uint32_t serve_chain(self) except? 0xFFFFFFFF
    cdef uint32_t serve_traced(self) except? 0xFFFFFFFF
    cdef uint32_t reply(self, int error) noexcept
    cdef void signal(self) noexcept
    cdef void park(self) noexcept
    cdef void put_off(self, parked_t *parked) noexcept
    cdef int retry(self, uint64_t now) except -1
    cdef int serve_parked(self, int i) except -1
    cdef void release(self, int i, uint32_t moved) noexcept
    cdef int answer_interrupted(self) except -1
    cdef int check_ring(self) except -1
    cdef int give_up(self) except -1
    cdef int64_t until_retry(self, uint64_t now) noexcept
    cdef int tick(self, uint64_t now) except -1
    cdef int64_t until_tick(self, uint64_t now) noexcept
