# cython: language_level=3, embedsignature=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""What asyncio waits with, and one descriptor that does not wait for asyncio; see selector.pyi."""

import math
from selectors import EVENT_READ, EVENT_WRITE, EpollSelector

from libc.stdint cimport uint32_t


cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLLIN
        EPOLLOUT
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *events, int max_events, int timeout)

cdef enum:
    MAX_EVENTS = 64


class FirstSelector(EpollSelector):
    def __init__(self, fd, serve):
        super().__init__()
        self.first = fd
        self.serve = serve

    def select(self, timeout=None):
        cdef epoll_event events[MAX_EVENTS]
        cdef int epoll = self.fileno()
        cdef int milliseconds = -1 if timeout is None else max(math.ceil(timeout * 1000), 0)
        cdef int first = self.first
        cdef int i, count
        with nogil:
            count = epoll_wait(epoll, events, MAX_EVENTS, milliseconds)
        for i in range(count):
            if events[i].data.fd == first:
                self.serve()
        ready = []
        keys = self.get_map()
        for i in range(count):
            key = keys.get(events[i].data.fd)
            if key is not None and key.fd != first:
                ready.append((key, key.events & told(events[i].events)))
        return ready


cdef int told(uint32_t events):
    # As in selectors.py: an error or a hang-up is for readers and for writers.
    return (EVENT_READ if events & ~EPOLLOUT else 0) | (EVENT_WRITE if events & ~EPOLLIN else 0)
