# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""From the virtqueue to the file system and back: chains become requests, replies become used buffers.

A request that changes what is leased to another guest is parked: its chain stays with us, and it is served from its
beginning when the lease is over. Other requests go on meanwhile.

One that finds the share full is parked, too, once and for a moment: the guest's FORGETs and RELEASEs of what it has
deleted may be in a ring that was not looked at yet.
"""

from libc.errno cimport EDQUOT, EINTR, EINVAL, EIO, ENOSPC
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.uio cimport iovec
from posix.unistd cimport close, read, write

from coherent_vfs.coherence.shm.leases cimport lt_now
from coherent_vfs.server.session.file_system cimport FileSystem
from coherent_vfs.server.fuse.wire cimport FUSE_READ, FUSE_WRITE, fuse_in_header, fuse_out_header, fuse_write_in
from coherent_vfs.server.caching.publishing cimport PARK
from coherent_vfs.server.operations.table cimport is_compiled, serve
from coherent_vfs.server.host.libc cimport monotonic_ns
from coherent_vfs.server.session.request cimport BODY_CAPACITY, NO_REPLY, request_t
from coherent_vfs.server.virtio.virtqueue cimport Virtqueue

import os

from coherent_vfs.coherence.common.log import get_logger, traces
from coherent_vfs.server.device.trace import answer, describe

log = get_logger(__name__)

cdef enum:
    MAX_DRAIN = 16             # reads of a kick descriptor that somebody fills as fast
    BUDGET = 64                # requests before other queues and sockets have their turn
    PARKED = 0xFFFFFFFE        # of serve_chain
    LONG_TRANSFER = 64 << 10   # bytes after which the driver is told at once, to go on while we do
    POLL_NS = 10_000_000       # how often a patient queue is looked at while it is polled
    IDLE_NS = 1_000_000_000    # how often idle inodes are looked at
    TRACED = 512               # bytes of a request that are looked at for the log
    FULL_US = 1000             # after which a request that found the share full is served once more


cdef class RequestQueue:
    """A running virtqueue of the device.

    Args:
        ring: the virtqueue.
        fs: where its requests go.
        kick, call, err: the descriptors that come with it, taken over; None where the front-end gave none.
        patient: nobody waits for what is on this queue, as on the hiprio queue, which carries FORGETs. It is polled
            after a kick, and its interrupts are held back, for 10 ms at the most: the guest and the server are
            spared a switch for each FORGET.
        on_broken: called once when the ring turns out to be broken.
    """

    def __cinit__(self, Virtqueue ring, FileSystem fs, kick, call, err, patient, on_broken):
        self.ring = ring
        self.fs = fs
        self.kick_fd = -1 if kick is None else kick
        self.call_fd = -1 if call is None else call
        self.err_fd = -1 if err is None else err
        # It is watched for edges. An eventfd needs not be read then; a pipe would fill up.
        self.drain = kick is not None and os.readlink(f"/proc/self/fd/{kick}") != "anon_inode:[eventfd]"
        # Without kicks the ring can only be polled, and a patient queue does that already.
        self.patient = patient or kick is None
        self.polling = kick is None
        self.on_broken = on_broken
        self.tracing = traces()
        self.request = <request_t *>malloc(sizeof(request_t))
        self.waiting = <parked_t *>malloc(ring.size * sizeof(parked_t))
        if self.request == NULL or self.waiting == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.request)
        free(self.waiting)

    @property
    def base(self) -> int:
        """The next available index, for GET_VRING_BASE."""
        return self.ring.base

    @property
    def parked(self) -> int:
        """How many requests wait for leases of other guests to end."""
        return self.parked_count

    def enable(self, enabled: bool) -> None:
        """Serve the ring, or leave it alone and drop what is parked; what came in meanwhile is served then."""
        if not enabled:
            self.parked_count = 0
        self.enabled = enabled
        self.ready = enabled

    def replace_call(self, call: int | None) -> None:
        """Take another descriptor for interrupts, and interrupt once: the old one may have missed some."""
        if self.call_fd >= 0:
            close(self.call_fd)
        self.call_fd = -1 if call is None else call
        self.interrupt()

    def replace_err(self, err: int | None) -> None:
        """Take another descriptor by which the front-end learns of a broken ring."""
        if self.err_fd >= 0:
            close(self.err_fd)
        self.err_fd = -1 if err is None else err

    def interrupt(self) -> None:
        """Interrupt the driver, whatever it asked for."""
        cdef uint64_t one = 1
        if self.call_fd >= 0:
            write(self.call_fd, &one, sizeof(one))

    def close(self) -> None:
        """Close the descriptors, telling the driver first what it has not been told."""
        if self.unsignalled and not self.ring.broken:
            self.signal()
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1
        self.enabled = False

    cdef void kicked(self) noexcept:
        cdef char kicks[4096]
        cdef int i
        if self.drain:
            for i in range(MAX_DRAIN):
                if read(self.kick_fd, kicks, sizeof(kicks)) < <ssize_t>sizeof(kicks):
                    break
        self.ready = True

    cdef int process(self) except -1:
        """Serve what the ring has, up to a budget. Sets ready where more is waiting."""
        cdef int got, served = 0
        cdef size_t moved
        self.ready = False
        if not self.enabled:
            return 0
        while served < BUDGET:
            got = self.ring.pop()
            if got == 0:
                if self.polling or not self.ring.enable_kicks():
                    break
                continue
            if got < 0:
                return self.give_up()
            self.last_try = False
            moved = self.serve_traced() if self.tracing else self.serve_chain()
            if self.ring.is_broken():
                return self.give_up()
            served += 1
            if moved == PARKED:
                if self.parked_count == self.ring.size:
                    # Only a driver that offers again what it has not got back can have so many.
                    self.ring.broken = True
                else:
                    self.park()
                continue
            self.ring.push(moved)
            self.unsignalled += 1
            if self.patient:
                continue
            # A lease runs from now on: the guest is to have the reply at once.
            if self.fs.validity.granted or moved >= LONG_TRANSFER or self.ring.readable_size >= LONG_TRANSFER:
                self.signal()
        if served == BUDGET:
            self.ready = True
        if self.patient:
            if served:
                self.polling = True
            if self.polling and self.kick_fd >= 0:
                self.ring.suppress_kicks()
            if self.unsignalled >= <uint32_t>self.ring.size // 4:
                self.signal()
        elif self.unsignalled:
            self.signal()
        return 0

    cdef void signal(self) noexcept:
        cdef uint64_t one = 1
        self.unsignalled = 0
        if self.ring.must_signal() and self.call_fd >= 0:
            write(self.call_fd, &one, sizeof(one))

    cdef void park(self) noexcept:
        """Keep the chain that was popped for later."""
        cdef parked_t *parked = &self.waiting[self.parked_count]
        parked.head = self.ring.head
        parked.held = False
        self.put_off(parked)
        self.parked_count += 1

    cdef void put_off(self, parked_t *parked) noexcept:
        """A request that was just served has to wait."""
        parked.unique = self.request.header.unique
        parked.due = self.fs.publisher.due * 1000
        parked.full = self.full
        if self.fs.publisher.leased and not parked.held:
            parked.held = True
            self.fs.publisher.held += 1

    cdef int retry(self, uint64_t now) except -1:
        """Serve what is parked and due."""
        cdef int i = 0
        while i < self.parked_count and self.enabled:
            # Nobody wakes one that waits for space.
            if self.waiting[i].due > now and (self.waiting[i].full or not self.woken):
                i += 1
            elif self.serve_parked(i) == 0:
                i += 1
        self.woken = False
        if self.unsignalled and self.enabled:
            self.signal()
        return 0

    cdef int serve_parked(self, int i) except -1:
        """Serve a parked request: 1, and it is no longer parked, or 0."""
        cdef uint64_t unique = self.waiting[i].unique
        cdef uint32_t moved
        if self.ring.walk(self.waiting[i].head) < 0:
            return self.give_up()
        self.last_try = self.waiting[i].full
        if self.last_try:
            self.fs.make_space()
        moved = self.serve_traced() if self.tracing else self.serve_chain()
        if self.ring.is_broken():
            return self.give_up()
        if moved != PARKED or self.request.header.unique != unique:
            # It may have failed before it came to what it had begun; or the guest has made another request of it.
            self.fs.mapped.forget_request(unique)
        if moved == PARKED:
            self.put_off(&self.waiting[i])
            return 0
        self.release(i, moved)
        return 1

    cdef int check_ring(self) except -1:
        """What was done may have met guest memory that is gone."""
        if self.enabled and self.ring.is_broken():
            self.give_up()
        return 0

    cdef int give_up(self) except -1:
        """The ring is broken: tell the front-end and whoever cares."""
        cdef uint64_t one = 1
        self.enabled = False
        self.parked_count = 0
        if self.err_fd >= 0:
            write(self.err_fd, &one, sizeof(one))
        self.on_broken()
        return 0

    cdef void release(self, int i, uint32_t moved) noexcept:
        """Give the chain of a parked request back."""
        cdef int k
        self.ring.push(moved)
        self.unsignalled += 1
        self.parked_count -= 1
        for k in range(i, self.parked_count):
            self.waiting[k] = self.waiting[k + 1]

    cdef int answer_interrupted(self) except -1:
        """Answer parked requests for which the guest does not want to wait any longer: they are not served."""
        cdef int i = 0
        while i < self.parked_count:
            if not was_interrupted(self.fs, self.waiting[i].unique):
                i += 1
            elif self.ring.walk(self.waiting[i].head) < 0:
                return self.give_up()
            else:
                self.fs.mapped.forget_request(self.waiting[i].unique)
                self.request.header.unique = self.waiting[i].unique
                if self.tracing:
                    log.debug("interrupted", unique=self.waiting[i].unique, answer="EINTR")
                self.release(i, self.reply(EINTR))
        if self.unsignalled and self.enabled and not self.patient:
            self.signal()
        return 0

    cdef int64_t until_retry(self, uint64_t now) noexcept:
        """Nanoseconds until retry() wants to be called, or -1."""
        cdef uint64_t due = 0
        cdef int i
        if self.parked_count == 0 or not self.enabled:
            return -1
        if self.woken or self.fs.woken:
            return 0
        for i in range(self.parked_count):
            if i == 0 or self.waiting[i].due < due:
                due = self.waiting[i].due
        return due - now if due > now else 0

    cdef int tick(self, uint64_t now) except -1:
        """What a patient queue does by time: look at its ring, tell the driver, let idle inodes go."""
        cdef bint quiet = self.ring.next_avail == self.avail_at_tick
        self.last_tick = now
        if self.enabled and self.polling:
            self.process()
            if self.unsignalled and self.enabled:
                self.signal()
            if quiet and self.kick_fd >= 0 and self.enabled:
                # Nothing since the last tick: back to waiting for kicks.
                self.polling = False
                self.ready = self.ring.enable_kicks()
            self.avail_at_tick = self.ring.next_avail
        if self.fs.inodes.expire_idle(now):
            self.fs.data_files.expire()
        return 0

    cdef int64_t until_tick(self, uint64_t now) noexcept:
        """Nanoseconds until tick() wants to be called, or -1."""
        cdef uint64_t due
        if not self.patient:
            return -1
        if self.enabled and self.polling:
            due = self.last_tick + POLL_NS
        elif self.fs.inodes.idle_ones.count or self.fs.data_files.count:
            due = self.last_tick + IDLE_NS
        else:
            return -1
        return due - now if due > now else 0

    cdef uint32_t serve_traced(self) except? 0xFFFFFFFF:
        """Serve the chain that was popped, and log the request with its answer. For who may look, not for speed."""
        cdef request_t *request = self.request
        cdef uint64_t began = monotonic_ns()
        cdef uint32_t moved
        self.error = 0
        request.body_size = 0
        moved = self.serve_chain()
        log.debug(
            "request",
            **describe(
                request.header.opcode, request.header.unique, request.header.nodeid,
                request.body[:min(request.body_size, <size_t>TRACED)],
            ),
            answer="parked" if moved == PARKED else answer(self.error, moved),
            us=(monotonic_ns() - began) // 1000,
        )
        return moved

    cdef uint32_t serve_chain(self) except? 0xFFFFFFFF:
        """Serve the chain that was popped: how many bytes were written to it."""
        cdef Virtqueue ring = self.ring
        cdef request_t *request = self.request
        cdef size_t total
        cdef int error
        if gather(ring.readable, ring.n_readable, 0, &request.header, sizeof(fuse_in_header)) < 0:
            return 0
        total = request.header.len
        self.fs.publisher.leased = False
        request.reply_size = 0
        request.reply_capacity = 0
        request.reply_buffer_count = 0
        if ring.writable_size >= sizeof(fuse_out_header):
            request.reply_capacity = ring.writable_size - sizeof(fuse_out_header)
            request.reply_buffer_count = skip(ring.writable, ring.n_writable, sizeof(fuse_out_header), request.reply_buffers)
        if total < sizeof(fuse_in_header) or total > ring.readable_size:
            return self.reply(EINVAL)
        request.body_size = total - sizeof(fuse_in_header)
        if request.header.opcode == FUSE_WRITE:
            if request.body_size < sizeof(fuse_write_in):
                return self.reply(EINVAL)
            request.data_size = request.body_size - sizeof(fuse_write_in)
            request.body_size = sizeof(fuse_write_in)
            request.data_count = skip(
                ring.readable, ring.n_readable, sizeof(fuse_in_header) + sizeof(fuse_write_in), request.data
            )
        elif request.body_size > BODY_CAPACITY:
            return self.reply(EINVAL)
        gather(ring.readable, ring.n_readable, sizeof(fuse_in_header), request.body, request.body_size)
        request.body[request.body_size] = 0
        if ring.is_broken():
            # The zeros that we see are not what the guest asks for.
            return 0
        if self.unsignalled and not is_compiled(request.header.opcode):
            # What is done already does not wait for an operation that may take long.
            self.signal()
        try:
            error = serve(self.fs, request)
        except Exception:
            log.exception("operation failed", opcode=request.header.opcode)
            error = EIO
        self.full = error in (ENOSPC, EDQUOT) and not (self.last_try or self.fs.publisher.abandoning)
        if self.full:
            error = self.fs.publisher.put_off(lt_now() + FULL_US)
        if error == PARK:
            # It is counted when it is served.
            self.fs.counters[request.header.opcode] -= 1
            return PARKED
        return self.reply(error)

    cdef uint32_t reply(self, int error) noexcept:
        """Write the reply into the chain, where one is due and there is room: how many bytes it has."""
        cdef Virtqueue ring = self.ring
        cdef request_t *request = self.request
        cdef fuse_out_header out
        if error == NO_REPLY or ring.writable_size < sizeof(out):
            return 0
        if error == 0 and request.header.opcode != FUSE_READ and request.reply_size:
            if request.reply_size <= request.reply_capacity:
                scatter(request.reply_buffers, request.reply, request.reply_size)
            else:
                error = EIO
        if error:
            request.reply_size = 0
        self.error = error
        out.len = sizeof(out) + request.reply_size
        out.error = -error
        out.unique = request.header.unique
        scatter(ring.writable, <char *>&out, sizeof(out))
        return out.len


cdef bint was_interrupted(FileSystem fs, uint64_t unique) noexcept:
    cdef unsigned i
    for i in range(fs.interrupted_count):
        if fs.interrupted[i] == unique:
            return True
    return False


cdef int gather(const iovec *iov, int count, size_t offset, void *target, size_t size) noexcept:
    """Copy bytes out of a list of buffers: 0, or -1 when it is too short."""
    cdef char *to = <char *>target
    cdef size_t part
    cdef int i
    for i in range(count):
        if size == 0:
            break
        if offset >= iov[i].iov_len:
            offset -= iov[i].iov_len
            continue
        part = min(size, iov[i].iov_len - offset)
        memcpy(to, <char *>iov[i].iov_base + offset, part)
        to += part
        size -= part
        offset = 0
    return -1 if size else 0


cdef void scatter(const iovec *iov, const char *source, size_t size) noexcept:
    """Copy bytes into a list of buffers that has room for them."""
    cdef size_t part
    while size:
        part = min(size, iov.iov_len)
        memcpy(iov.iov_base, source, part)
        source += part
        size -= part
        iov += 1


cdef int skip(const iovec *iov, int count, size_t offset, iovec *rest) noexcept:
    """Make a list of what remains of another after offset bytes: how many buffers that is."""
    cdef int i, n = 0
    for i in range(count):
        if offset >= iov[i].iov_len:
            offset -= iov[i].iov_len
            continue
        rest[n].iov_base = <char *>iov[i].iov_base + offset
        rest[n].iov_len = iov[i].iov_len - offset
        offset = 0
        n += 1
    return n
