from libc.stdint cimport uint32_t

from coherent_vfs.server.fuse.wire cimport fuse_open_out
from coherent_vfs.server.passthrough.inode_table cimport inode_t
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport request_t

cdef int open_file(FileSystem fs, request_t *request) except -100
cdef int open_directory(FileSystem fs, request_t *request) except -100
cdef int release(FileSystem fs, request_t *request) except -100
cdef int flush(FileSystem fs, request_t *request) except -100
cdef int read(FileSystem fs, request_t *request) except -100
cdef int write(FileSystem fs, request_t *request) except -100

# For CREATE.
cdef int allowed_flags(FileSystem fs, uint32_t flags) noexcept
cdef int open_inode(FileSystem fs, request_t *request, inode_t *inode, int flags, bint kill, int *fd)
cdef int opened(FileSystem fs, inode_t *inode, int fd, int flags, fuse_open_out *out) noexcept
