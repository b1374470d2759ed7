from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.session.request cimport request_t

cdef int look_up(FileSystem fs, request_t *request) except -100
cdef int forget(FileSystem fs, request_t *request) except -100
cdef int batch_forget(FileSystem fs, request_t *request) except -100
cdef int getattr_(FileSystem fs, request_t *request) except -100
