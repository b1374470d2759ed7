# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -std=gnu11
"""The driver's side of one split virtqueue, in memory shared with the device (virtio 1.2, section 2.7).

A ring has a fixed number of *slots*. Each slot owns, for good, a run of descriptors, a request area and a reply
area, so nothing is ever allocated: a request takes a free slot, and the slot is free again when the device has
used it. Which slots are free, who waits for which and how the two sides wake each other is the caller's
business (transport.py).

Words that the device reads or writes meanwhile are accessed with C11 atomics only.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from coherent_vfs.server.virtio.atomics cimport full_fence, load_acquire_16, store_release_16

cdef packed struct Descriptor:
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t next

cdef packed struct UsedElement:
    uint32_t id
    uint32_t length

cdef enum:
    F_NEXT = 1
    F_WRITE = 2
    F_INDIRECT = 4
    USED_F_NO_NOTIFY = 1

# The longest chain is: header, arguments, data, reply header, reply body.
DESCRIPTORS_PER_SLOT = 8
cdef enum:
    RUN = 8
    OUT_HEADER_BYTES = 16


cdef size_t align(size_t value, size_t to):
    return (value + to - 1) // to * to


cdef class Ring:
    """One virtqueue of slots * DESCRIPTORS_PER_SLOT descriptors, laid out from `start` in `memory`.

    Args:
        memory: the writable buffer shared with the device; offsets in it are guest addresses.
        start: offset of the first byte that the ring may use; rounded up to a page.
        slots: requests that can be in flight; a power of two.
        request_bytes: size of each slot's request area.
        reply_bytes: size of each slot's reply area, with the 16 bytes of the FUSE reply header.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.

    Raises:
        ValueError: the memory is too small, or slots is not a power of two.
    """

    cdef Py_buffer _buffer
    cdef bint _held
    cdef uint8_t *_base
    cdef Descriptor *_descriptors
    cdef uint16_t *_avail
    cdef uint16_t *_used
    cdef uint16_t *_used_event
    cdef uint16_t *_avail_event
    cdef uint16_t _next_avail
    cdef uint16_t _last_used
    cdef size_t _tables
    cdef size_t _requests
    cdef size_t _replies
    cdef size_t _request_bytes
    cdef size_t _reply_bytes
    cdef bint _indirect
    cdef bint _event_idx
    cdef uint8_t[::1] _in_flight
    cdef readonly size_t slots
    cdef readonly size_t size
    cdef readonly size_t descriptors
    cdef readonly size_t available
    cdef readonly size_t used
    cdef readonly size_t end

    def __init__(self, memory, size_t start, size_t slots, size_t request_bytes, size_t reply_bytes,
                 bint indirect, bint event_idx):
        if slots == 0 or slots & (slots - 1) or slots * RUN > 32768:
            raise ValueError(f"a ring of {slots} slots: it must be a power of two up to {32768 // RUN}")
        self.slots = slots
        self.size = slots * RUN
        self.descriptors = align(start, 4096)
        self.available = self.descriptors + self.size * sizeof(Descriptor)
        self.used = align(self.available + 6 + 2 * self.size, 4096)
        self._tables = align(self.used + 6 + 8 * self.size, 4096)
        self._request_bytes = align(request_bytes, 4096)
        self._reply_bytes = align(reply_bytes, 4096)
        self._requests = align(self._tables + self.size * sizeof(Descriptor), 4096)
        self._replies = self._requests + slots * self._request_bytes
        self.end = self._replies + slots * self._reply_bytes
        self._indirect = indirect
        self._event_idx = event_idx
        PyObject_GetBuffer(memory, &self._buffer, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self._held = True
        if <size_t>self._buffer.len < self.end:
            self.close()
            raise ValueError(f"the ring ends at {self.end}, the memory at {len(memory)}")
        self._base = <uint8_t *>self._buffer.buf
        self._descriptors = <Descriptor *>(self._base + self.descriptors)
        self._avail = <uint16_t *>(self._base + self.available)
        self._used = <uint16_t *>(self._base + self.used)
        self._used_event = self._avail + 2 + self.size
        self._avail_event = self._used + 2 + 4 * self.size
        memset(self._base + self.descriptors, 0, self._requests - self.descriptors)
        self._next_avail = 0
        self._last_used = 0
        self._in_flight = bytearray(slots)

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        """Let go of the memory. Every later call raises ValueError."""
        if self._held:
            self._held = False
            PyBuffer_Release(&self._buffer)

    cdef uint8_t *_memory(self, size_t slot) except NULL:
        if not self._held:
            raise ValueError("the ring is closed")
        if slot >= self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        return self._base

    def place(self, size_t slot, const uint8_t[::1] header, const uint8_t[::1] arguments,
              const uint8_t[::1] data, size_t reply_bytes):
        """Write a request into a free slot, as a chain like Linux's: header, arguments, data | header, body.

        Args:
            slot: a slot that is not in flight.
            header, arguments, data: the request's parts; the last two may be empty.
            reply_bytes: room for the reply, with its header; 0 for a request that has none.

        Raises:
            ValueError: it does not fit the slot, or the slot is in flight.
        """
        cdef uint8_t *base = self._memory(slot)
        cdef size_t lengths[5]
        cdef const uint8_t *sources[3]
        cdef size_t at = self._requests + slot * self._request_bytes
        cdef size_t first = slot * RUN
        cdef size_t offset = 0 if self._indirect else first
        cdef size_t count = 0
        cdef size_t part
        cdef Descriptor *table
        cdef Descriptor *descriptor = NULL
        if self._in_flight[slot]:
            raise ValueError(f"slot {slot} is in flight")
        if <size_t>(header.shape[0] + arguments.shape[0] + data.shape[0]) > self._request_bytes:
            raise ValueError("the request is too long for a slot")
        if reply_bytes > self._reply_bytes:
            raise ValueError("the reply would be too long for a slot")
        lengths[0] = header.shape[0]
        lengths[1] = arguments.shape[0]
        lengths[2] = data.shape[0]
        lengths[3] = min(reply_bytes, <size_t>OUT_HEADER_BYTES)
        lengths[4] = reply_bytes - lengths[3]
        sources[0] = &header[0] if lengths[0] else NULL
        sources[1] = &arguments[0] if lengths[1] else NULL
        sources[2] = &data[0] if lengths[2] else NULL
        table = <Descriptor *>(base + self._tables) + first if self._indirect else self._descriptors + first
        for part in range(5):
            if part == 3:
                at = self._replies + slot * self._reply_bytes
            if lengths[part] == 0:
                continue
            if descriptor != NULL:
                descriptor.flags |= F_NEXT
                descriptor.next = <uint16_t>(offset + count)
            if part < 3:
                memcpy(base + at, sources[part], lengths[part])
            descriptor = table + count
            descriptor.address = at
            descriptor.length = <uint32_t>lengths[part]
            descriptor.flags = F_WRITE if part >= 3 else 0
            descriptor.next = 0
            at += lengths[part]
            count += 1
        if self._indirect:
            descriptor = self._descriptors + first
            descriptor.address = self._tables + first * sizeof(Descriptor)
            descriptor.length = <uint32_t>(count * sizeof(Descriptor))
            descriptor.flags = F_INDIRECT
            descriptor.next = 0

    def publish(self, size_t slot):
        """Give a placed slot to the device.

        Returns:
            Whether the device wants to be told (its kick descriptor written).
        """
        self._memory(slot)
        cdef uint16_t old = self._next_avail
        cdef uint16_t new = <uint16_t>(old + 1)
        self._avail[2 + (old & (self.size - 1))] = <uint16_t>(slot * RUN)
        self._in_flight[slot] = True
        self._next_avail = new
        store_release_16(self._avail + 1, new)
        # The index must be visible before the device's wish is read, or both sides could sleep.
        full_fence()
        if self._event_idx:
            return <uint16_t>(new - load_acquire_16(self._avail_event) - 1) < <uint16_t>(new - old)
        return not load_acquire_16(self._used) & USED_F_NO_NOTIFY

    def reap(self):
        """Take back what the device has used.

        Returns:
            (slot, reply length in bytes) of each request that ended since the last call.

        Raises:
            OSError: EIO, the device named a descriptor that is not the head of a chain in flight, or a length
                beyond its reply area, or more entries than are in flight.
        """
        self._memory(0)
        cdef uint16_t index = load_acquire_16(self._used + 1)
        cdef UsedElement *elements = <UsedElement *>(self._used + 2)
        cdef volatile UsedElement *element
        cdef uint32_t head, length
        cdef size_t slot
        ended = []
        while self._last_used != index:
            element = <volatile UsedElement *>elements + (self._last_used & (self.size - 1))
            head = element.id
            length = element.length
            slot = head // RUN
            if head % RUN or slot >= self.slots or not self._in_flight[slot]:
                raise OSError(EIO, f"the device used descriptor {head}, which heads no chain in flight")
            if length > self._reply_bytes:
                raise OSError(EIO, f"the device wrote {length} bytes into a chain of {self._reply_bytes}")
            self._in_flight[slot] = False
            self._last_used += 1
            ended.append((slot, length))
        return ended

    def arm(self):
        """Ask the device to call when it next uses a slot.

        Returns:
            Whether it has used one already, so that one must reap and not sleep.
        """
        self._memory(0)
        if self._event_idx:
            store_release_16(self._used_event, self._last_used)
            full_fence()
        return load_acquire_16(self._used + 1) != self._last_used

    def reply(self, size_t slot, size_t length):
        """The first `length` bytes of a slot's reply area, copied."""
        cdef uint8_t *base = self._memory(slot)
        if length > self._reply_bytes:
            raise ValueError(f"{length} bytes of a reply area of {self._reply_bytes}")
        return PyBytes_FromStringAndSize(<char *>base + self._replies + slot * self._reply_bytes, length)
