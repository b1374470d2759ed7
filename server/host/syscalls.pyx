# distutils: extra_compile_args = -O2 -std=gnu11
# cython: language_level=3, boundscheck=False, wraparound=False
"""System calls that the standard library lacks. Each raises OSError with the call's errno."""

import os

from libc.errno cimport errno

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate"(int fd, int mode, long offset, long length)

cdef extern from "<stdio.h>" nogil:
    int c_renameat2 "renameat2"(int olddirfd, const char *oldpath, int newdirfd, const char *newpath,
                                unsigned int flags)

cdef extern from "<unistd.h>" nogil:
    int c_syncfs "syncfs"(int fd)

cdef extern from "<sys/stat.h>" nogil:
    const int AT_FDCWD
    long C_UTIME_NOW "UTIME_NOW"
    long C_UTIME_OMIT "UTIME_OMIT"
    int c_utimensat "utimensat"(int dirfd, const char *path, const timespec *times, int flags)

UTIME_NOW = C_UTIME_NOW
UTIME_OMIT = C_UTIME_OMIT


cdef int checked(int result) except -1:
    if result < 0:
        code = errno
        raise OSError(code, os.strerror(code))
    return result


def renameat2(int olddirfd, bytes oldname, int newdirfd, bytes newname, unsigned int flags):
    checked(c_renameat2(olddirfd, oldname, newdirfd, newname, flags))


def fallocate(int fd, int mode, long offset, long length):
    cdef int result
    with nogil:
        result = c_fallocate(fd, mode, offset, length)
    checked(result)


def syncfs(int fd):
    cdef int result
    with nogil:
        result = c_syncfs(fd)
    checked(result)


def utimensat(bytes path, long atime, long atimensec, long mtime, long mtimensec):
    cdef timespec[2] times
    times[0].tv_sec = atime
    times[0].tv_nsec = atimensec
    times[1].tv_sec = mtime
    times[1].tv_nsec = mtimensec
    checked(c_utimensat(AT_FDCWD, path, times, 0))
