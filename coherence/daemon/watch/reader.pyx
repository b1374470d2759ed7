# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The events of an inotify instance, and the short way from a write to its bump; see queue.pyi."""

import os

from coherent_vfs.coherence.shm.table cimport vt_inode_slot
from coherent_vfs.coherence.daemon.watch.invalidator cimport Domain
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport read


cdef extern from "<sys/inotify.h>" nogil:
    enum:
        IN_MODIFY
    struct inotify_event:
        int wd
        uint32_t mask
        uint32_t cookie
        uint32_t len
        char name[0]

cdef extern from "<fcntl.h>" nogil:
    enum:
        AT_SYMLINK_NOFOLLOW

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct status_t "struct stat":
        uint64_t st_dev
        uint64_t st_ino
    int fstatat(int fd, const char *name, status_t *status, int flags)

cdef enum:
    READ_BYTES = 65536


cdef class Event:
    cdef readonly int wd
    cdef readonly uint32_t mask, cookie
    cdef readonly bytes name
    cdef readonly list positions


cdef Event event_of(inotify_event *event):
    cdef Event one = Event.__new__(Event)
    one.wd, one.mask, one.cookie = event.wd, event.mask, event.cookie
    one.name = name_of(event)
    one.positions = []
    return one


cdef bytes name_of(inotify_event *event):
    # A name is padded with zeros, one at least.
    return <bytes>event.name if event.len else b""


cdef class Queue:
    cdef int fd
    cdef Domain domain
    cdef dict watched
    cdef object backend_ids, tell, left
    cdef readonly long position
    # What is left for others, by what the kernel wrote of it.
    cdef dict events
    cdef char buffer[READ_BYTES]

    def __init__(self, fd, Domain domain not None, watched, backend_ids, tell, left):
        self.fd = fd
        self.domain = domain
        self.watched = watched
        self.backend_ids = backend_ids
        self.tell = tell
        self.left = left
        self.position = 0
        self.events = {}

    def serve(self):
        self.read_once(True)
        if self.events:
            self.left()

    def read(self, bumps):
        while self.read_once(bumps) > READ_BYTES // 2:
            pass
        events, self.events = self.events, {}
        return list(events.values())

    cdef ssize_t read_once(self, bint bumps) except -1:
        """Returns how many bytes there were."""
        cdef ssize_t size = read(self.fd, self.buffer, READ_BYTES)
        cdef ssize_t end = 0
        cdef inotify_event *event
        if size < 0:
            if errno in (EAGAIN, EINTR):
                return 0
            raise OSError(errno, os.strerror(errno))
        while end < size:
            event = <inotify_event *>(self.buffer + end)
            end += sizeof(inotify_event) + event.len
            self.position += 1
            if self.events or not bumps or not self.bumped(event):
                self.leave(event)
        return size

    cdef int leave(self, inotify_event *event) except -1:
        written = PyBytes_FromStringAndSize(<char *>event, sizeof(inotify_event) + event.len)
        cdef Event one = self.events.get(written)
        if one is None:
            one = self.events[written] = event_of(event)
        one.positions.append(self.position)
        return 0

    cdef bint bumped(self, inotify_event *event) except -1:
        """Bump a write that is surely the host's; whether it is one."""
        cdef status_t status
        cdef uint64_t slot
        watched = self.watched.get(event.wd) if event.mask == IN_MODIFY else None
        if watched is None:
            return False
        if event.len == 0:
            slot = watched.slot
        elif fstatat(watched.fd, event.name, &status, AT_SYMLINK_NOFOLLOW) == 0:
            slot = vt_inode_slot(&self.domain.table.vt, status.st_dev, status.st_ino)
        else:
            return False
        # In this order: the origin is written before the lock is given back.
        if self.domain.leases.locked(slot):
            return False
        origin = self.domain.leases.origin(slot)
        if origin is not None and origin[0] in self.backend_ids:
            return False
        self.domain.bump_inode(slot, True)
        self.domain.counts.events += 1
        self.domain.counts.bumped += 1
        if self.domain.on_change is not None:
            self.tell(watched, name_of(event))
        return True
