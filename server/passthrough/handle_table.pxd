from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef struct handle_t:
    uint64_t fh
    uint64_t nodeid
    int fd                 # -1 while the record is free
    int flags              # of O_APPEND and O_DIRECT, what the descriptor has
    # Directories: what getdents64 gave and the guest has not taken yet.
    char *entries
    size_t entries_at, entries_end
    int64_t entries_offset
    int64_t next_free

cdef class HandleTable:
    cdef handle_t *records
    cdef int64_t count, capacity, free_record
    cdef readonly uint64_t live
    cdef readonly uint64_t buffers    # of entries

    cdef handle_t *open(self, uint64_t nodeid, int fd, int flags) noexcept
    cdef handle_t *get(self, uint64_t nodeid, uint64_t fh) noexcept
    cdef int set_flags(self, handle_t *handle, int flags) noexcept
    cdef bint holds(self, uint64_t nodeid) noexcept
    cdef void close(self, handle_t *handle) noexcept
    cdef bint take_buffer(self, handle_t *handle, size_t size) noexcept
    cdef void drop_entries(self, handle_t *handle) noexcept
