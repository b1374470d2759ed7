from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport request_t

cdef int create(FileSystem fs, request_t *request) except -100
