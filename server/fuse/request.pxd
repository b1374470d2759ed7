"""One FUSE request on its way through the compiled operations."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from posix.uio cimport iovec

from coherent_vfs.server.fuse.wire cimport fuse_in_header
from coherent_vfs.server.virtio.virtqueue cimport MAX_IOV

cdef enum:
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
