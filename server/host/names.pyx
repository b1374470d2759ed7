# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The one check of the names that a guest sends: one component, and no way out of its directory."""

from libc.errno cimport EINVAL, ENAMETOOLONG
from libc.stddef cimport size_t

import os


def checked_name(name: bytes) -> bytes:
    """A name in a directory, after making sure that it is one.

    Raises:
        OSError: ENAMETOOLONG beyond 255 bytes; EINVAL when empty, '.', '..', or with a slash or a NUL in it.
    """
    cdef int error = name_error(name, len(name))
    if error:
        raise OSError(error, os.strerror(error))
    return name


cdef int name_error(const char *name, size_t length) noexcept:
    """0, or why these bytes are not the name of a directory entry."""
    cdef size_t i
    if length > 255:
        return ENAMETOOLONG
    if length == 0 or (name[0] == c"." and (length == 1 or (length == 2 and name[1] == c"."))):
        return EINVAL
    for i in range(length):
        if name[i] == c"/" or name[i] == 0:
            return EINVAL
    return 0
