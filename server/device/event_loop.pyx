# cython: language_level=3
# distutils: extra_compile_args = -O3 -std=gnu11
"""The event loop of vfs-backend: kicks go straight to their queues, other descriptors to Python callbacks."""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, itimerspec
from posix.unistd cimport close

from coherent_vfs.server.host.libc cimport monotonic_ns
from coherent_vfs.server.device.request_queue cimport RequestQueue

import heapq
import itertools
import os

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
    const uint32_t EPOLLIN
    const uint32_t EPOLLET
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int op, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int count, int timeout)

cdef extern from "<sys/timerfd.h>" nogil:
    enum:
        TFD_CLOEXEC
        TFD_TIMER_ABSTIME
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)

cdef enum:
    EVENTS = 32

cdef uint64_t NEVER = <uint64_t>-1


cdef class EventLoop:
    """Waits for kicks, sockets and timers, one thread for all."""

    cdef int epoll_fd, timer_fd
    cdef uint64_t armed
    cdef dict sources
    cdef list queues
    cdef list timers
    cdef object order
    cdef bint stopping
    cdef object drained        # called when nothing is parked any more; until then nothing new is taken

    def __cinit__(self):
        self.sources = {}
        self.queues = []
        self.timers = []
        self.order = itertools.count()
        self.timer_fd = -1
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            raise OSError(errno, "no epoll descriptor")
        self.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)
        if self.timer_fd < 0:
            raise OSError(errno, "no timer descriptor")
        self.watch(self.timer_fd, None)

    def __dealloc__(self):
        for fd in (self.epoll_fd, self.timer_fd):
            if fd >= 0:
                close(fd)

    def add_reader(self, fd: int, callback) -> None:
        """Call back whenever the descriptor can be read or has ended."""
        self.watch(fd, callback)

    def remove_reader(self, fd: int) -> None:
        """Stop that; before the descriptor is closed."""
        if self.sources.pop(fd, None) is not None and epoll_ctl(self.epoll_fd, EPOLL_CTL_DEL, fd, NULL) < 0:
            # It was closed before: if others have what it was open on, its events would come for ever.
            self.renew()

    def add_queue(self, RequestQueue queue) -> None:
        """Serve a queue from now on."""
        if queue.kick_fd >= 0:
            self.watch(queue.kick_fd, queue)
        self.queues.append(queue)

    def remove_queue(self, RequestQueue queue) -> None:
        """Stop that; before the queue is closed."""
        self.queues.remove(queue)
        if queue.kick_fd >= 0:
            self.remove_reader(queue.kick_fd)

    def call_later(self, seconds: float, callback) -> None:
        """Call back once, after so many seconds."""
        heapq.heappush(self.timers, (monotonic_ns() + int(seconds * 1e9), next(self.order), callback))

    def drain(self, done) -> None:
        """Take nothing new from the queues until nothing of them is parked, then call back once and go on as before.

        Called from a callback. None: go on at once, and call nobody.
        """
        self.drained = done

    def stop(self) -> None:
        """Let run() return after what it is doing."""
        self.stopping = True

    def run(self) -> None:
        """Serve until stop(). Exceptions of callbacks, and of signal handlers, come out of here."""
        cdef epoll_event events[EVENTS]
        cdef uint64_t now, due
        cdef int count, i
        cdef RequestQueue queue
        self.stopping = False
        while not self.stopping:
            now = monotonic_ns()
            due = self.due(now)
            if due > now:
                self.arm(due, now)
            with nogil:
                count = epoll_wait(self.epoll_fd, events, EVENTS, 0 if due <= now else -1)
            if count < 0 and errno != EINTR:
                raise OSError(errno, os.strerror(errno))
            PyErr_CheckSignals()
            for i in range(count):
                source = self.sources.get(events[i].data.fd)
                if type(source) is RequestQueue:
                    (<RequestQueue>source).kicked()
                elif source is not None:
                    source()
            if self.drained is None:
                for queue in self.queues:
                    if queue.ready or queue.polling:
                        queue.process()
            self.answer_interrupted()
            self.run_timers()
            for queue in self.queues:
                queue.check_ring()
            if self.drained is not None:
                self.end_drain()

    cdef uint64_t due(self, uint64_t now) except? 0:
        """When there is something to do, if no event comes first; now where there is already, or NEVER."""
        cdef RequestQueue queue
        cdef uint64_t due = NEVER
        cdef int64_t until
        for queue in self.queues:
            if self.drained is None:
                if queue.ready:
                    return now
                until = queue.until_tick(now)
                if until >= 0:
                    due = min(due, now + until)
            until = queue.until_retry(now)
            if until >= 0:
                due = min(due, now + until)
        if self.timers:
            due = min(due, <uint64_t>self.timers[0][0])
        return due

    cdef int arm(self, uint64_t due, uint64_t now) except -1:
        """Let the timer ring then; it may ring before, for something that is not waited for any more.

        A timer, as what is waited for stays the same over many events: a timeout would be set up for each of them.
        """
        cdef itimerspec at
        if due == NEVER or now < self.armed <= due:
            return 0
        memset(&at, 0, sizeof(at))
        at.it_value.tv_sec = due // 1_000_000_000
        at.it_value.tv_nsec = due % 1_000_000_000
        if timerfd_settime(self.timer_fd, TFD_TIMER_ABSTIME, &at, NULL) < 0:
            raise OSError(errno, os.strerror(errno))
        self.armed = due
        return 0

    cdef int answer_interrupted(self) except -1:
        """An INTERRUPT may be about a request of any queue; one about what is served already is over."""
        cdef RequestQueue queue
        for queue in self.queues:
            if queue.fs.interrupted_count:
                queue.answer_interrupted()
        for queue in self.queues:
            queue.fs.interrupted_count = 0
        return 0

    cdef int run_timers(self) except -1:
        cdef RequestQueue queue
        cdef uint64_t now = monotonic_ns()
        # Whoever is served below may wake again, also what has had its turn.
        for queue in self.queues:
            queue.woken = queue.fs.woken
        for queue in self.queues:
            queue.fs.woken = False
        for queue in self.queues:
            if self.drained is None and queue.until_tick(now) == 0:
                queue.tick(now)
            if queue.until_retry(now) == 0:
                queue.retry(now)
        while self.timers and <uint64_t>self.timers[0][0] <= now:
            heapq.heappop(self.timers)[2]()
        return 0

    cdef int end_drain(self) except -1:
        cdef RequestQueue queue
        for queue in self.queues:
            if queue.parked_count:
                return 0
        drained, self.drained = self.drained, None
        drained()
        return 0

    cdef int watch(self, int fd, source) except -1:
        cdef epoll_event event
        event.events = EPOLLIN
        if source is None or type(source) is RequestQueue:
            # For edges: the timer is armed anew without being read, and a kick descriptor whose other end is gone
            # must not wake us for ever.
            event.events |= EPOLLET
        event.data.fd = fd
        if epoll_ctl(self.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        self.sources[fd] = source
        return 0

    cdef int renew(self) except -1:
        """Wait for what is in sources, and for nothing else."""
        cdef int old = self.epoll_fd
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll_fd < 0:
            self.epoll_fd = old
            raise OSError(errno, "no epoll descriptor")
        close(old)
        for fd, source in list(self.sources.items()):
            self.watch(fd, source)
        return 0
