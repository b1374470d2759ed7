from server.file_system cimport FileSystem
from server.request cimport request_t

cdef int readdir(FileSystem fs, request_t *request) noexcept
