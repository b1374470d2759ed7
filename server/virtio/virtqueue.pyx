# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The device side of a split virtqueue (virtio 1.2, 2.7), with indirect descriptors and EVENT_IDX."""

from libc.stddef cimport size_t
from libc.stdint cimport UINT32_MAX, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.uio cimport iovec

from coherent_vfs.server.virtio.atomics cimport full_fence, load_acquire_16, store_release_16
from coherent_vfs.server.virtio.guest_memory cimport GuestMemory

cdef enum:
    VIRTQ_DESC_F_NEXT = 1
    VIRTQ_DESC_F_WRITE = 2
    VIRTQ_DESC_F_INDIRECT = 4
    VIRTQ_AVAIL_F_NO_INTERRUPT = 1
    VIRTQ_USED_F_NO_NOTIFY = 1

MAX_QUEUE_SIZE = MAX_IOV


cdef class Virtqueue:
    """One ring in guest memory.

    Nothing in the ring is trusted: an index, length or address that cannot be right makes the queue broken,
    and pop() says so from then on.

    Args:
        memory: the guest's memory.
        size: descriptors, a power of two up to 1024.
        desc, avail, used: front-end addresses of the three parts.
        base: the first available index to process.
        event_idx: VIRTIO_RING_F_EVENT_IDX was negotiated.

    Raises:
        ValueError: the size is wrong or a part lies outside the memory.
    """

    def __init__(self, GuestMemory memory, int size, desc: int, avail: int, used: int, base: int, event_idx: bool):
        if not 1 <= size <= MAX_IOV or size & (size - 1):
            raise ValueError(f"a queue of {size} descriptors is not possible: a power of two up to {MAX_IOV}")
        self.memory = memory
        self.size = size
        self.desc_addr, self.avail_addr, self.used_addr = desc, avail, used
        self.event_idx = event_idx
        self.readable = <iovec *>malloc(2 * MAX_IOV * sizeof(iovec))
        if self.readable == NULL:
            raise MemoryError
        self.writable = self.readable + MAX_IOV
        self.rebind()
        self.next_avail = base
        # After a reconnection the ring itself knows best what was already given back.
        self.next_used = load_acquire_16(&self.used[1])
        self.signalled_used = self.next_used
        self.never_signalled = True

    def __dealloc__(self):
        free(self.readable)

    @property
    def base(self) -> int:
        """The next available index to process, as GET_VRING_BASE reports it."""
        return self.next_avail

    def rebind(self) -> None:
        """Find the ring again after the memory changed; where it is no longer mapped: ValueError, and it is broken."""
        self.desc = <desc_t *>self.memory.translate_user(self.desc_addr, 16 * self.size)
        self.avail = <uint16_t *>self.memory.translate_user(self.avail_addr, 6 + 2 * self.size)
        self.used = <uint16_t *>self.memory.translate_user(self.used_addr, 6 + 8 * self.size)
        if self.desc == NULL or self.avail == NULL or self.used == NULL:
            self.broken = True
            raise ValueError("a part of the ring lies outside the guest's memory")
        if self.desc_addr % 16 or self.avail_addr % 2 or self.used_addr % 4:
            raise ValueError("a part of the ring is not aligned")

    cdef bint is_broken(self) noexcept:
        """Whether the ring is broken; it is, too, when a part of the guest's memory is gone."""
        self.broken = self.broken or self.memory.is_lost()
        return self.broken

    cdef int pop(self) noexcept:
        """Take the next chain: 1, or 0 when there is none, or -1 when the ring is broken."""
        cdef uint16_t avail_idx
        if self.broken:
            return -1
        avail_idx = load_acquire_16(&self.avail[1])
        if avail_idx == self.next_avail:
            return 0
        if <uint16_t>(avail_idx - self.next_avail) > self.size:
            self.broken = True
            return -1
        if self.walk(self.avail[2 + (self.next_avail & (self.size - 1))]) < 0:
            return -1
        self.next_avail += 1
        return 1

    cdef int walk(self, uint16_t head) noexcept:
        """Look at the chain that begins with a descriptor: 1, or -1 when the ring is broken."""
        cdef desc_t entry
        cdef desc_t *table = self.desc
        cdef uint32_t table_size = self.size
        cdef uint32_t index, seen = 0
        cdef uint64_t available = 0
        cdef bint indirect = False
        if self.broken:
            return -1
        self.broken = True
        self.head = index = head
        self.n_readable = self.n_writable = 0
        self.readable_size = self.writable_size = 0
        while True:
            if index >= table_size or seen == MAX_IOV:
                return -1
            seen += 1
            # The guest may change a descriptor while it is read: each is read once.
            entry = (<volatile desc_t *>table)[index]
            if entry.flags & VIRTQ_DESC_F_INDIRECT:
                if indirect or entry.flags & VIRTQ_DESC_F_NEXT or entry.len == 0 or entry.len % sizeof(desc_t):
                    return -1
                table = <desc_t *>self.memory.translate(entry.addr, entry.len, &available)
                if table == NULL or available != entry.len:
                    return -1
                table_size = entry.len // sizeof(desc_t)
                index = 0
                indirect = True
                continue
            if self.add_segment(entry.addr, entry.len, entry.flags & VIRTQ_DESC_F_WRITE) < 0:
                return -1
            if not entry.flags & VIRTQ_DESC_F_NEXT:
                break
            index = entry.next
        if self.readable_size + self.writable_size > UINT32_MAX:
            return -1
        self.broken = False
        return 1

    cdef int add_segment(self, uint64_t addr, uint32_t length, bint writable) noexcept:
        """Append a descriptor's memory to the chain; neighbours in our address space become one iovec."""
        cdef iovec *iov = self.writable if writable else self.readable
        cdef int n = self.n_writable if writable else self.n_readable
        cdef uint64_t available = 0
        cdef char *host
        if not writable and self.n_writable:
            return -1
        if writable:
            self.writable_size += length
        else:
            self.readable_size += length
        while length:
            host = self.memory.translate(addr, length, &available)
            if host == NULL:
                return -1
            if n and <char *>iov[n - 1].iov_base + iov[n - 1].iov_len == host:
                iov[n - 1].iov_len += available
            elif n == MAX_IOV:
                return -1
            else:
                iov[n].iov_base = host
                iov[n].iov_len = available
                n += 1
            addr += available
            length -= available
        if writable:
            self.n_writable = n
        else:
            self.n_readable = n
        return 0

    cdef void push(self, uint32_t written) noexcept:
        """Give the popped chain back with so many bytes written to it."""
        cdef used_elem_t *element = <used_elem_t *>&self.used[2] + (self.next_used & (self.size - 1))
        element.id = self.head
        element.len = written
        self.next_used += 1
        store_release_16(&self.used[1], self.next_used)

    cdef bint must_signal(self) noexcept:
        """Whether the driver wants an interrupt for what was pushed since the last one (2.7.7.2, 2.7.10)."""
        cdef uint16_t used_event, old = self.signalled_used
        cdef bint first = self.never_signalled
        if old == self.next_used and not first:
            return False
        full_fence()
        if not self.event_idx:
            self.signalled_used = self.next_used
            self.never_signalled = False
            return not load_acquire_16(&self.avail[0]) & VIRTQ_AVAIL_F_NO_INTERRUPT
        used_event = load_acquire_16(&self.avail[2 + self.size])
        self.signalled_used = self.next_used
        self.never_signalled = False
        return first or <uint16_t>(self.next_used - used_event - 1) < <uint16_t>(self.next_used - old)

    cdef void suppress_kicks(self) noexcept:
        """Ask the driver not to kick: whoever calls this looks at the ring by itself."""
        if self.event_idx:
            # Half the ring away: a driver that fills it is noticed all the same.
            store_release_16(<uint16_t *>(<used_elem_t *>&self.used[2] + self.size), self.next_avail + (self.size >> 1))
        else:
            store_release_16(&self.used[0], VIRTQ_USED_F_NO_NOTIFY)

    cdef bint enable_kicks(self) noexcept:
        """Ask for kicks again; true when something came in meanwhile and pop() must be called first."""
        if self.event_idx:
            store_release_16(<uint16_t *>(<used_elem_t *>&self.used[2] + self.size), self.next_avail)
        else:
            store_release_16(&self.used[0], 0)
        full_fence()
        return load_acquire_16(&self.avail[1]) != self.next_avail
