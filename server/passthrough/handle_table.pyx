# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The files and directories that a guest has open: fh to descriptor."""

from libc.errno cimport EINVAL, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from posix.fcntl cimport F_SETFL, O_APPEND, fcntl
from posix.unistd cimport close

from coherent_vfs.server.host.libc cimport O_DIRECT

cdef enum:
    INDEX_BITS = 32
    SETTABLE = O_APPEND | O_DIRECT


cdef class HandleTable:
    """All open handles of one guest's session. An fh is index | generation << 32, never 0, and never comes twice."""

    def __cinit__(self):
        self.free_record = -1

    def __dealloc__(self):
        self.clear()
        free(self.records)

    def clear(self) -> None:
        """Close everything: the guest's session is over."""
        cdef int64_t i
        for i in range(self.count):
            if self.records[i].fd >= 0:
                self.close(&self.records[i])

    cdef handle_t *open(self, uint64_t nodeid, int fd, int flags) noexcept:
        """A handle for fd, which it takes and which is open with these flags; NULL: no memory. The pointer is good
        until the next open()."""
        cdef handle_t *handle
        cdef handle_t *grown
        cdef int64_t i, capacity
        if self.free_record < 0:
            if self.count == self.capacity:
                capacity = 2 * self.capacity if self.capacity else 64
                grown = <handle_t *>realloc(self.records, capacity * sizeof(handle_t))
                if grown == NULL:
                    close(fd)
                    return NULL
                self.records = grown
                self.capacity = capacity
            i = self.count
            self.count += 1
            self.records[i].fh = <uint64_t>i
        else:
            i = self.free_record
            self.free_record = self.records[i].next_free
        handle = &self.records[i]
        handle.fh += <uint64_t>1 << INDEX_BITS
        handle.nodeid = nodeid
        handle.fd = fd
        handle.flags = flags & SETTABLE
        handle.entries = NULL
        handle.entries_at = handle.entries_end = 0
        handle.entries_offset = 0
        self.live += 1
        return handle

    cdef handle_t *get(self, uint64_t nodeid, uint64_t fh) noexcept:
        """The open handle with this fh of this inode, or NULL."""
        cdef int64_t i = <int64_t>(fh & (((<uint64_t>1) << INDEX_BITS) - 1))
        if i >= self.count or self.records[i].fh != fh or self.records[i].fd < 0 or self.records[i].nodeid != nodeid:
            return NULL
        return &self.records[i]

    cdef int set_flags(self, handle_t *handle, int flags) noexcept:
        """Let the descriptor have O_APPEND and O_DIRECT, or not, as these flags: 0 or an errno.

        fcntl(F_SETFL) of the guest's programs does not come to us: what it did is in the flags of the next READ or
        WRITE. A file system that knows no O_DIRECT does without; a file that is append-only (chattr +a) refuses
        with EPERM to be without O_APPEND.
        """
        flags &= SETTABLE
        if flags == handle.flags:
            return 0
        if fcntl(handle.fd, F_SETFL, flags) < 0:
            if errno != EINVAL or fcntl(handle.fd, F_SETFL, flags & ~O_DIRECT) < 0:
                return errno
        handle.flags = flags
        return 0

    cdef bint holds(self, uint64_t nodeid) noexcept:
        """Whether any handle is of this inode; looks at all."""
        cdef int64_t i
        for i in range(self.count):
            if self.records[i].fd >= 0 and self.records[i].nodeid == nodeid:
                return True
        return False

    cdef void close(self, handle_t *handle) noexcept:
        close(handle.fd)
        self.drop_entries(handle)
        handle.fd = -1
        handle.next_free = self.free_record
        self.free_record = handle - self.records
        self.live -= 1

    cdef bint take_buffer(self, handle_t *handle, size_t size) noexcept:
        """Give a handle a buffer for directory entries; false: no memory."""
        handle.entries = <char *>malloc(size)
        self.buffers += handle.entries != NULL
        return handle.entries != NULL

    cdef void drop_entries(self, handle_t *handle) noexcept:
        """Give up the buffer, if there is one: the next READDIR seeks to its offset."""
        self.buffers -= handle.entries != NULL
        free(handle.entries)
        handle.entries = NULL
        handle.entries_at = handle.entries_end = 0
        handle.entries_offset = 0
