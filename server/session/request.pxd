"""One FUSE request: as compiled operations get it, and as operations in Python do."""

from libc.errno cimport EINVAL
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from coherent_vfs.server.fuse.wire cimport fuse_in_header
from coherent_vfs.server.host.libc cimport strnlen
from coherent_vfs.server.host.names cimport name_error
from coherent_vfs.server.virtio.virtqueue cimport MAX_IOV

cdef enum:
    NO_REPLY = -1                  # in place of an errno
    BODY_CAPACITY = 128 << 10      # the largest body but a WRITE's: SETXATTR with 64 KiB, many forgets
    REPLY_CAPACITY = 128 << 10     # the largest reply but a READ's: a buffer of directory entries

cdef struct request_t:
    fuse_in_header header
    # What follows the header; of a WRITE, fuse_write_in only. Always ends in a NUL that is not counted.
    char body[BODY_CAPACITY + 8]
    size_t body_size
    # A WRITE's data, in the guest's memory.
    iovec data[MAX_IOV]
    int data_count
    size_t data_size
    # Room for the reply's body, in the guest's memory.
    iovec reply_buffers[MAX_IOV]
    int reply_buffer_count
    size_t reply_capacity
    # The reply's body; a READ's goes straight to the room and is only counted.
    char reply[REPLY_CAPACITY]
    size_t reply_size


cdef inline int name_in(request_t *request, size_t offset, const char **name, size_t *length) noexcept:
    """The name in a request's body: 0 or an errno. The body always ends in a NUL."""
    if request.body_size <= offset:
        return EINVAL
    name[0] = request.body + offset
    length[0] = strnlen(name[0], request.body_size - offset)
    return name_error(name[0], length[0])


cdef class Request:
    cdef readonly int opcode
    cdef readonly uint64_t nodeid
    cdef readonly uint64_t unique
    cdef readonly uint32_t uid
    cdef readonly uint32_t gid
    cdef readonly uint32_t pid
    cdef readonly bytes body
    cdef readonly size_t reply_size


cdef Request wrap(const request_t *request)
