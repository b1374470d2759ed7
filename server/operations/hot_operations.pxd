from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.fuse.request cimport request_t

cdef enum:
    NO_REPLY = -1

cdef bint is_compiled(unsigned opcode) noexcept
cdef int serve(FileSystem fs, request_t *request)
