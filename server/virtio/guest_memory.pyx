# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The guest's memory as its front-end shares it: regions, mapped here, found by guest or front-end address."""

from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, UINT64_MAX, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport MAP_FAILED, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "sigbus.h":
    void sigbus_install()
    int sigbus_guard(void *start, size_t size)
    bint sigbus_is_lost(int range)
    void sigbus_forget(int range)

import mmap as _mmap
import os
import stat

MAX_REGIONS = 509
"""As many as QEMU's largest machine uses; the vhost-user answer to GET_MAX_MEM_SLOTS."""


cdef class GuestMemory:
    """All memory regions of one guest.

    Addresses from the guest are never followed without translate(), which refuses whatever lies outside.
    """

    def __cinit__(self):
        self.regions = <region_t *>calloc(MAX_REGIONS, sizeof(region_t))
        if self.regions == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.regions != NULL:
            self.clear()
            free(self.regions)

    def __len__(self):
        return self.count

    def add(self, guest_addr: int, size: int, user_addr: int, mmap_offset: int, fd: int) -> None:
        """Map one region.

        Args:
            guest_addr: guest physical address of its first byte.
            size: bytes.
            user_addr: where the front-end has it mapped; ring addresses are given in these.
            mmap_offset: offset of the region in the file.
            fd: the file; still the caller's to close.

        Raises:
            ValueError: empty, wrapping round, overlapping, past the end of its file, or too many regions.
            OSError: the file cannot be mapped.
        """
        cdef region_t *region
        cdef int i
        if self.count == MAX_REGIONS:
            raise ValueError(f"more than {MAX_REGIONS} memory regions")
        if (
            size <= 0
            or min(guest_addr, user_addr, mmap_offset) < 0
            or max(guest_addr, user_addr) + size > UINT64_MAX
            or mmap_offset + size > INT64_MAX
        ):
            raise ValueError(f"memory region of {size} bytes at {guest_addr:#x} is not possible")
        for i in range(self.count):
            region = &self.regions[i]
            if guest_addr < region.guest_addr + region.size and region.guest_addr < guest_addr + size:
                raise ValueError(f"memory region at {guest_addr:#x} overlaps another")
        status = os.fstat(fd)
        # A store past the end of the file would be a SIGBUS here.
        if stat.S_ISREG(status.st_mode) and status.st_size < mmap_offset + size:
            raise ValueError(f"memory region at {guest_addr:#x} reaches past the end of its file")
        cdef uint64_t slack = mmap_offset % _mmap.ALLOCATIONGRANULARITY
        cdef size_t map_size = size + slack
        cdef char *base = <char *>mmap(
            NULL, map_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, mmap_offset - slack
        )
        if base == <char *>MAP_FAILED:
            raise OSError(f"memory region at {guest_addr:#x} cannot be mapped")
        sigbus_install()
        cdef int guard = sigbus_guard(base, map_size)
        if guard < 0:
            munmap(base, map_size)
            raise ValueError("more memory regions than can be guarded")
        region = &self.regions[self.count]
        region.guest_addr = guest_addr
        region.size = size
        region.user_addr = user_addr
        region.map_base = base
        region.map_size = map_size
        region.host = base + slack
        region.guard = guard
        self.count += 1

    def remove(self, guest_addr: int, size: int, user_addr: int) -> None:
        """Unmap the region that has exactly these numbers; KeyError where there is none."""
        cdef int i
        cdef region_t *region
        for i in range(self.count):
            region = &self.regions[i]
            if region.guest_addr == guest_addr and region.size == size and region.user_addr == user_addr:
                unmap(region)
                self.count -= 1
                self.regions[i] = self.regions[self.count]
                return
        raise KeyError(f"no memory region of {size} bytes at {guest_addr:#x}")

    def exchange(self, GuestMemory other) -> None:
        """Take the other's regions, and give it these."""
        self.regions, other.regions = other.regions, self.regions
        self.count, other.count = other.count, self.count

    def clear(self) -> None:
        """Unmap everything."""
        cdef int i
        for i in range(self.count):
            unmap(&self.regions[i])
        self.count = 0

    @property
    def lost(self) -> bool:
        """Whether a page was gone when it was needed: what is here is not the guest's memory any more."""
        return self.is_lost()

    cdef bint is_lost(self) noexcept:
        cdef int i
        for i in range(self.count):
            if sigbus_is_lost(self.regions[i].guard):
                return True
        return False

    cdef char *translate(self, uint64_t guest_addr, uint64_t length, uint64_t *available) noexcept:
        """Where guest_addr is mapped, or NULL; *available is how many of the length bytes follow there."""
        cdef int i
        cdef region_t *region
        cdef uint64_t offset
        for i in range(self.count):
            region = &self.regions[i]
            offset = guest_addr - region.guest_addr
            if guest_addr >= region.guest_addr and offset < region.size:
                available[0] = min(length, region.size - offset)
                return region.host + offset
        return NULL

    cdef char *translate_user(self, uint64_t user_addr, uint64_t length) noexcept:
        """Where the front-end's address is mapped here with all its length bytes, or NULL."""
        cdef int i
        cdef region_t *region
        cdef uint64_t offset
        for i in range(self.count):
            region = &self.regions[i]
            offset = user_addr - region.user_addr
            if user_addr >= region.user_addr and offset < region.size and length <= region.size - offset:
                return region.host + offset
        return NULL


cdef void unmap(region_t *region) noexcept:
    munmap(region.map_base, region.map_size)
    sigbus_forget(region.guard)
