from libc.stddef cimport size_t

cdef int name_error(const char *name, size_t length) noexcept
