# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The lease table, seen from Python; docs/concepts/leases.md has the rules, leases.h the operations for compiled code."""

import os
import struct

import posix_ipc

from coherent_vfs.coherence.common.errors import OtherClock, UserError

from libc.stdint cimport uint64_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from coherent_vfs.coherence.shm.table cimport Table, vt_unpin

FIRST_OFFSET = LT_WORD_FIRST * 8
BACKEND_MAX = LT_BACKEND_MAX


def lease_table_bytes(slot_count):
    """The size of the lease table of a version table with so many slots."""
    return FIRST_OFFSET + (slot_count >> LB_SLOT_BITS) * LB_WORDS * 8


def clock_offset(path="/proc/self/timens_offsets"):
    """What the time namespace of this process adds to CLOCK_MONOTONIC, nanoseconds (time_namespaces(7))."""
    try:
        with open(path) as file:
            offsets = {clock: int(seconds) * 1_000_000_000 + int(rest) for clock, seconds, rest in map(str.split, file)}
    except FileNotFoundError:
        # A kernel without time namespaces.
        return 0
    return offsets["monotonic"]


# Of a process it never changes, and a backend in its sandbox cannot look any more.
CLOCK_OFFSET = clock_offset()


cdef class Leases:
    """A mapped lease table: create() or from_fd() make one."""

    def __init__(self):
        raise TypeError("use Leases.create or Leases.from_fd")

    def __dealloc__(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.size)

    @staticmethod
    def create(name, Table table):
        size = lease_table_bytes(table.slot_count)
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except (ValueError, OSError, posix_ipc.Error) as error:
            raise UserError(f"shared memory {name} cannot be created: {error}") from None
        try:
            # Allocated at once: a store into a hole of a full file system would kill the process (SIGBUS).
            os.posix_fallocate(memory.fd, 0, size)
            header = bytearray(FIRST_OFFSET)
            struct.pack_into("<2Q", header, 8 * LT_WORD_ABI, LT_ABI, table.slot_count >> LB_SLOT_BITS)
            header[8 * LT_WORD_DOMAIN : 8 * LT_WORD_DOMAIN + 16] = table.domain
            struct.pack_into("<Q", header, 8 * LT_WORD_EPOCH, 1)
            struct.pack_into("<q", header, 8 * LT_WORD_CLOCK, CLOCK_OFFSET)
            os.pwrite(memory.fd, header, 0)
            os.pwrite(memory.fd, struct.pack("<Q", LT_MAGIC), 0)
            return Leases.from_fd(memory.fd, table)
        except OSError as error:
            posix_ipc.unlink_shared_memory(name)
            raise UserError(
                f"shared memory {name} of {size} bytes: {error.strerror}: free memory or use fewer slots"
            ) from None
        finally:
            memory.close_fd()

    @staticmethod
    def from_fd(fd, Table table):
        cdef Leases leases = Leases.__new__(Leases)
        leases.table = table
        leases.move(fd)
        return leases

    def move(self, fd):
        cdef size_t size = lease_table_bytes(self.table.slot_count)
        cdef void *mapping
        header = os.pread(fd, FIRST_OFFSET, 0)
        if (
            os.fstat(fd).st_size < size
            or struct.unpack_from("<3Q", header) != (LT_MAGIC, LT_ABI, self.table.slot_count >> LB_SLOT_BITS)
            or header[8 * LT_WORD_DOMAIN : 8 * LT_WORD_DOMAIN + 16] != self.table.domain
        ):
            raise UserError("the lease table is not one of this version table: restart coherenced")
        ahead = CLOCK_OFFSET - struct.unpack_from("<q", header, 8 * LT_WORD_CLOCK)[0]
        if ahead:
            raise OtherClock(
                f"the clock of this process is {ahead / 1e9:+g} s off that of the lease table: "
                "start coherenced and its backends in one time namespace"
            )
        mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if mapping == MAP_FAILED:
            raise OSError("the shared memory cannot be mapped")
        self.close()
        self.mapping = mapping
        self.size = size
        lt_attach(&self.lt, mapping, self.table.slot_count >> LB_SLOT_BITS)

    def close(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.size)
            self.mapping = NULL

    cdef int check(self, slot) except -1:
        if self.mapping == NULL:
            raise ValueError("the lease table is closed")
        if not 0 <= slot < (<Table>self.table).vt.slot_count:
            raise IndexError(f"slot {slot} of a table with {self.table.slot_count} slots")
        return 0

    def next_backend(self, used):
        self.check(0)
        cdef uint64_t *word = <uint64_t *>self.mapping + LT_WORD_NEXT_BACKEND
        for _ in range(LT_BACKEND_MAX):
            word[0] = word[0] % LT_BACKEND_MAX + 1
            if word[0] not in used:
                return word[0]
        raise UserError(f"there are {LT_BACKEND_MAX} backends already: end one, or use another table")

    @property
    def epoch(self):
        self.check(0)
        return lt_load(&self.lt, LT_WORD_EPOCH)

    def end_watch_epoch(self):
        self.check(0)
        lt_bump_epoch(&self.lt)

    @property
    def markers_wanted(self):
        self.check(0)
        return lt_load(&self.lt, LT_WORD_MARKERS) != 0

    def want_markers(self, wanted):
        self.check(0)
        lt_want_markers(&self.lt, wanted)

    def origin(self, slot):
        self.check(slot)
        cdef uint64_t number = 0
        cdef uint64_t backend_id = lt_origin(&self.lt, slot, &number)
        return (backend_id, number) if backend_id else None

    def locked(self, slot):
        self.check(slot)
        return lb_locked(lb_word(lt_bucket(&self.lt, slot)), lt_now())

    def changed(self, slot, data):
        self.check(slot)
        if data:
            lt_set_data(&self.lt, &(<Table>self.table).vt, slot)
        lb_note(lt_bucket(&self.lt, slot), lt_now())

    def unpin(self, slot):
        self.check(slot)
        cdef lb_t *bucket = lt_bucket(&self.lt, slot)
        cdef uint64_t old = 0, now = lt_now()
        # Who changes something has it locked until after the bump.
        cdef uint64_t mine = lb_lock(bucket, LT_MANY, now, &old)
        if mine == 0:
            return False
        vt_unpin(&(<Table>self.table).vt, slot)
        lb_unlock(bucket, mine, lb_free_since(lt_now()))
        return True

    def release(self, backend_id):
        self.check(0)
        cdef uint64_t i, now = lt_now()
        for i in range(self.lt.mask + 1):
            lb_release(lt_bucket(&self.lt, i), backend_id, now)

    def leased_until(self, hash, backend_id):
        self.check(0)
        return lb_leased_until(lt_bucket(&self.lt, hash), hash, backend_id, lt_now())

    def grant(self, hash, backend_id, stamp, microseconds):
        self.check(0)
        cdef uint64_t now = lt_now()
        return lt_grant(
            &self.lt, &(<Table>self.table).vt, hash, backend_id, stamp, now, now + <uint64_t>microseconds
        )

    def lock(self, slot, backend_id):
        self.check(slot)
        cdef uint64_t old = 0
        return lb_lock(lt_bucket(&self.lt, slot), backend_id, lt_now(), &old)

    def close_until(self, slot, microseconds):
        self.check(slot)
        lb_close(lt_bucket(&self.lt, slot), lt_now() + <uint64_t>microseconds)
