from libc.stdint cimport uint32_t

cdef int become(uint32_t uid, uint32_t gid) noexcept
cdef void come_back() noexcept
cdef void drop_fsetid() noexcept
cdef void restore_fsetid() noexcept
