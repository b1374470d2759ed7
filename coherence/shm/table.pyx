# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The version table and a backend's journal lane, seen from Python; the layout is in docs/reference/table.md.

The operations themselves are in table.h, for compiled code of any package; the classes here map the
shared memory, check it once, and give Python the same operations with bounds checked.
"""

import fcntl
import os
import secrets
import struct
from collections import namedtuple
from pathlib import Path

import posix_ipc

from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.shm.paths import open_file, table_path

from libc.stdint cimport uint64_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close as posix_close

SLOTS_OFFSET = VT_WORD_SLOTS * 8
DEFAULT_SLOT_COUNT = 1 << 20
MIN_SLOT_COUNT = 1 << VT_BITS_MIN
MAX_SLOT_COUNT = 1 << VT_BITS_MAX
ROOT_BITS = VT_ROOT_BITS
ABI_VERSION = VT_ABI
TRUST_NOTHING = VT_DISTRUST
JOURNAL_MAX = VJ_MAX
JOURNAL_BYTES = VJ_BYTES

JournalContent = namedtuple("JournalContent", "domain backend_id changes announced")


def check_header(header, size, what):
    """Refuse a table that this program cannot use; see table.pyi."""
    if len(header) < SLOTS_OFFSET or header[:8] != struct.pack("<Q", VT_MAGIC):
        raise UserError(f"{what} is not a version table: start coherenced, or name the table it made")
    abi, slot_count = struct.unpack_from("<2Q", header, 8)
    if abi != VT_ABI:
        raise UserError(
            f"{what} is a version table of ABI {abi}, this program needs ABI {VT_ABI}: stop everything that "
            "uses the table and remove the file, or use programs of one version"
        )
    if not MIN_SLOT_COUNT <= slot_count <= MAX_SLOT_COUNT or slot_count & (slot_count - 1):
        raise UserError(f"{what} has a slot count of {slot_count}: stop all that uses it and remove it")
    if size < SLOTS_OFFSET + 8 * slot_count:
        raise UserError(
            f"{what} is cut off, {size} bytes for {slot_count} slots: stop all that uses it and remove it"
        )


def journal_content(domain, backend_id):
    """The content of a new journal; see table.pyi."""
    content = bytearray(VJ_BYTES)
    struct.pack_into("<2Q", content, 0, VJ_MAGIC, VJ_ABI)
    content[8 * VJ_WORD_DOMAIN : 8 * VJ_WORD_DOMAIN + 16] = domain
    struct.pack_into("<Q", content, 8 * VJ_WORD_BACKEND, backend_id)
    return bytes(content)


def parse_journal(content):
    """What a journal's content says; see table.pyi."""
    if len(content) != VJ_BYTES or struct.unpack_from("<2Q", content) != (VJ_MAGIC, VJ_ABI):
        raise UserError("the journal is not one of this version: restart coherenced")
    domain = content[8 * VJ_WORD_DOMAIN : 8 * VJ_WORD_DOMAIN + 16]
    backend_id, changes = struct.unpack_from("<2Q", content, 8 * VJ_WORD_BACKEND)
    count, *slots = struct.unpack_from(f"<{1 + VJ_MAX}Q", content, 8 * VJ_WORD_LANE)
    return JournalContent(domain, backend_id, changes, tuple(slots[:count]) if count <= VJ_MAX else None)


cdef void *map_shared(int fd, size_t size, bint writable) except NULL:
    cdef void *mapping = mmap(NULL, size, PROT_READ | (PROT_WRITE if writable else 0), MAP_SHARED, fd, 0)
    if mapping == MAP_FAILED:
        raise OSError("the shared memory cannot be mapped")
    return mapping


cdef class Table:
    """A mapped version table: create(), open() or from_fd() make one."""

    def __init__(self):
        raise TypeError("use Table.create, Table.open or Table.from_fd")

    def __dealloc__(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.size)

    cdef int check_open(self) except -1:
        if self.mapping == NULL:
            raise ValueError("the version table is closed")
        return 0

    cdef int check_writable(self) except -1:
        self.check_open()
        if not self.writable:
            raise PermissionError("the version table is mapped read-only")
        return 0

    cdef uint64_t checked_slot(self, slot) except? 0:
        self.check_open()
        if not 0 <= slot < self.vt.slot_count:
            raise IndexError(f"slot {slot} of a table with {self.vt.slot_count} slots")
        return slot

    @staticmethod
    def create(name, slot_count=DEFAULT_SLOT_COUNT, *, mode=0o600):
        if not MIN_SLOT_COUNT <= slot_count <= MAX_SLOT_COUNT or slot_count & (slot_count - 1):
            raise UserError(
                f"slot count {slot_count}: use a power of two from {MIN_SLOT_COUNT} to {MAX_SLOT_COUNT}"
            )
        try:
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=mode)
        except posix_ipc.ExistentialError:
            raise UserError(f"shared memory {name} exists already: open it, or choose another name") from None
        except (ValueError, OSError, posix_ipc.Error) as error:
            raise UserError(f"shared memory {name} cannot be created: {error}") from None
        cdef Table table
        try:
            # Allocated at once: a store into a hole of a full file system would kill the process (SIGBUS).
            os.posix_fallocate(memory.fd, 0, SLOTS_OFFSET + 8 * slot_count)
            header = bytearray(SLOTS_OFFSET)
            struct.pack_into("<2Q", header, 8 * VT_WORD_ABI, VT_ABI, slot_count)
            header[8 * VT_WORD_SEED : 8 * VT_WORD_SEED + 16] = secrets.token_bytes(16)
            header[8 * VT_WORD_DOMAIN : 8 * VT_WORD_DOMAIN + 16] = secrets.token_bytes(16)
            # Both start at 1, so that a stamp of 0 is never good.
            struct.pack_into("<Q", header, 8 * VT_WORD_SEQUENCE, 1)
            struct.pack_into("<Q", header, 8 * VT_WORD_FLOOR, 1)
            os.pwrite(memory.fd, header, 0)
            # The magic comes last: whoever finds the file before sees no table, not half a one.
            os.pwrite(memory.fd, struct.pack("<Q", VT_MAGIC), 0)
            table = Table.from_fd(memory.fd, writable=True)
        except OSError as error:
            posix_ipc.unlink_shared_memory(name)
            raise UserError(
                f"shared memory {name} of {slot_count} slots: {error.strerror}: free memory or use fewer slots"
            ) from None
        finally:
            memory.close_fd()
        return table

    @staticmethod
    def open(path_or_name, writable=False):
        path = table_path(path_or_name)
        try:
            fd = open_file(path, os.O_RDWR if writable else os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such version table: start coherenced, or name the table it made"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: name the version table that coherenced made") from None
        try:
            return Table.from_fd(fd, writable, str(path))
        finally:
            os.close(fd)

    @staticmethod
    def from_fd(fd, writable=False, what="the version table"):
        size = os.fstat(fd).st_size
        try:
            header = os.pread(fd, SLOTS_OFFSET, 0)
        except OSError as error:
            raise UserError(f"{what} cannot be read: {error.strerror}: name a version table") from None
        check_header(header, size, what)
        cdef Table table = Table.__new__(Table)
        table.size = SLOTS_OFFSET + 8 * struct.unpack_from("<Q", header, 8 * VT_WORD_SLOT_COUNT)[0]
        table.mapping = map_shared(fd, table.size, writable)
        table.writable = writable
        vt_attach(&table.vt, table.mapping)
        if 8 * table.vt.slot_count + SLOTS_OFFSET != table.size:
            raise UserError(f"{what} changed while it was opened: try again")
        return table

    def close(self):
        if self.mapping != NULL:
            munmap(self.mapping, self.size)
            self.mapping = NULL

    @property
    def slot_count(self):
        return self.vt.slot_count

    @property
    def bits(self):
        return self.vt.bits

    @property
    def domain(self):
        self.check_open()
        return struct.pack("<2Q", vt_load(&self.vt, VT_WORD_DOMAIN), vt_load(&self.vt, VT_WORD_DOMAIN + 1))

    @property
    def sequence(self):
        self.check_open()
        return vt_load(&self.vt, VT_WORD_SEQUENCE)

    @property
    def floor(self):
        self.check_open()
        cdef uint64_t floor = vt_load(&self.vt, VT_WORD_FLOOR)
        return VT_DISTRUST if vt_distrusted(floor) else floor

    @property
    def root_bits(self):
        self.check_open()
        return frozenset([bit for bit in range(VT_ROOT_BITS) if vt_is_root(&self.vt, bit)])

    @property
    def root_epoch(self):
        self.check_open()
        return vt_load(&self.vt, VT_WORD_ROOT_EPOCH)

    def add_root(self, slot):
        self.check_writable()
        vt_add_root(&self.vt, self.checked_slot(slot))

    def keep_roots(self, slots):
        self.check_writable()
        cdef unsigned at
        kept = [0] * (VT_ROOT_BITS // 64)
        for slot in slots:
            bit = self.checked_slot(slot) % VT_ROOT_BITS
            kept[bit // 64] |= 1 << bit % 64
        for i, word in enumerate(kept):
            at = <unsigned>(VT_WORD_ROOTS + i)
            vt_store(&self.vt, at, vt_load(&self.vt, at) & <uint64_t>word)

    def inode_hash(self, uint64_t dev, uint64_t ino):
        return vt_inode_hash(&self.vt, dev, ino)

    def inode_slot(self, uint64_t dev, uint64_t ino):
        return vt_inode_slot(&self.vt, dev, ino)

    def name_slot(self, uint64_t dir_slot, const unsigned char[::1] name):
        return vt_name_slot(&self.vt, dir_slot, <const char *>&name[0] if name.shape[0] else NULL, name.shape[0])

    def siphash(self, uint64_t first, const unsigned char[::1] data):
        return vt_siphash(&self.vt, first, &data[0] if data.shape[0] else NULL, data.shape[0])

    def is_root(self, slot):
        return vt_is_root(&self.vt, self.checked_slot(slot))

    def bump(self, slot):
        self.check_writable()
        return vt_bump(&self.vt, self.checked_slot(slot))

    def pin(self, slot):
        self.check_writable()
        vt_pin(&self.vt, self.checked_slot(slot))

    def pinned(self):
        self.check_open()
        return [slot for slot in range(self.slot_count) if vt_is_pinned(&self.vt, slot)]

    def stamp(self):
        self.check_open()
        return vt_stamp(&self.vt)

    def valid(self, slot, uint64_t stamp):
        return vt_valid(&self.vt, self.checked_slot(slot), stamp)

    def slot(self, index):
        return vt_load(&self.vt, <unsigned>(VT_WORD_SLOTS + self.checked_slot(index)))

    def slots_above_sequence(self):
        self.check_open()
        cdef uint64_t i, n = 0
        for i in range(self.vt.slot_count):
            # The sequence is read after the slot, so that a bump meanwhile is no false alarm.
            if not vt_is_pinned(&self.vt, i) and vt_load(&self.vt, <unsigned>(VT_WORD_SLOTS + i)) > vt_load(
                &self.vt, VT_WORD_SEQUENCE
            ):
                n += 1
        return n

    def raise_floor(self):
        self.check_writable()
        vt_raise_floor(&self.vt)

    def distrust(self):
        self.check_writable()
        vt_distrust(&self.vt)


cdef class Journal:
    """A backend's mapped journal."""

    def __init__(self):
        raise TypeError("use Journal.from_fd")

    def __dealloc__(self):
        if self.mapping != NULL:
            munmap(self.mapping, VJ_BYTES)
            posix_close(self.fd)

    cdef int check_open(self) except -1:
        if self.mapping == NULL:
            raise ValueError("the journal is closed")
        return 0

    @staticmethod
    def from_fd(fd):
        cdef Journal journal = Journal.__new__(Journal)
        journal.fd = -1
        journal.move(fd)
        return journal

    def move(self, fd):
        content = parse_journal(os.pread(fd, JOURNAL_BYTES, 0))
        cdef void *mapping = map_shared(fd, VJ_BYTES, True)
        cdef void *old = self.mapping
        cdef int old_fd = self.fd
        cdef uint64_t entries[VJ_MAX]
        cdef unsigned i
        cdef uint64_t count = vj_load(&self.vj, 0) if old != NULL else 0
        for i in range(VJ_MAX if old != NULL else 0):
            entries[i] = vj_load(&self.vj, 1 + i)
        vj_attach(&self.vj, <uint64_t *>mapping + VJ_WORD_LANE)
        self.mapping = mapping
        self.backend_id = content.backend_id
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        if old != NULL:
            vj_announce(&self.vj, entries, <unsigned>count)
            munmap(old, VJ_BYTES)
            os.close(old_fd)

    def close(self):
        if self.mapping != NULL:
            munmap(self.mapping, VJ_BYTES)
            self.mapping = NULL
            os.close(self.fd)
            self.fd = -1

    def announce(self, slots):
        cdef uint64_t entries[VJ_MAX]
        cdef unsigned i
        self.check_open()
        for i in range(min(len(slots), VJ_MAX)):
            entries[i] = slots[i]
        vj_announce(&self.vj, entries, <unsigned>len(slots))

    def clear(self):
        self.check_open()
        vj_clear(&self.vj)

    @property
    def entries(self):
        self.check_open()
        count = min(vj_load(&self.vj, 0), <uint64_t>VJ_MAX)
        return tuple(vj_load(&self.vj, <unsigned>(1 + i)) for i in range(<unsigned>count))
