# cython: language_level=3
"""The version table for compiled code: `from coherent_vfs.coherence.shm.table cimport Table, Journal, vt_bump`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t


cdef extern from "table.h" nogil:
    enum:
        VT_WORD_MAGIC
        VT_WORD_ABI
        VT_WORD_SLOT_COUNT
        VT_WORD_SEED
        VT_WORD_DOMAIN
        VT_WORD_SEQUENCE
        VT_WORD_FLOOR
        VT_WORD_ROOT_EPOCH
        VT_WORD_ROOTS
        VT_WORD_SLOTS
        VT_ROOT_BITS
        VT_BITS_MIN
        VT_BITS_MAX
        VT_ABI
        VJ_WORD_MAGIC
        VJ_WORD_ABI
        VJ_WORD_DOMAIN
        VJ_WORD_BACKEND
        VJ_WORD_CHANGES
        VJ_WORD_LANE
        VJ_BYTES
        VJ_MAX
        VJ_ABI
    const uint64_t VT_MAGIC
    const uint64_t VJ_MAGIC
    const uint64_t VT_DISTRUST

    ctypedef struct vt_t:
        uint64_t slot_count, mask
        unsigned bits
        uint64_t k0, k1
    ctypedef struct vj_t:
        pass

    void vt_attach(vt_t *vt, void *mapping)
    uint64_t vt_load(const vt_t *vt, unsigned word)
    void vt_store(vt_t *vt, unsigned word, uint64_t value)
    uint64_t vt_siphash(const vt_t *vt, uint64_t first, const void *data, size_t len)

    uint64_t vt_inode_hash(const vt_t *vt, uint64_t dev, uint64_t ino)
    uint64_t vt_name_hash(const vt_t *vt, uint64_t dir_slot, const char *name, size_t len)
    uint64_t vt_inode_slot(const vt_t *vt, uint64_t dev, uint64_t ino)
    uint64_t vt_name_slot(const vt_t *vt, uint64_t dir_slot, const char *name, size_t len)
    uint64_t vt_bump(vt_t *vt, uint64_t slot)
    void vt_pin(vt_t *vt, uint64_t slot)
    void vt_unpin(vt_t *vt, uint64_t slot)
    bint vt_is_pinned(const vt_t *vt, uint64_t slot)
    uint64_t vt_stamp(const vt_t *vt)
    bint vt_valid(const vt_t *vt, uint64_t slot, uint64_t stamp)
    bint vt_is_root(const vt_t *vt, uint64_t slot)
    void vt_add_root(vt_t *vt, uint64_t slot)
    bint vt_distrusted(uint64_t floor)
    void vt_lift_floor(vt_t *vt)
    void vt_raise_floor(vt_t *vt)
    void vt_distrust(vt_t *vt)

    void vj_attach(vj_t *vj, void *lane)
    void vj_announce(vj_t *vj, const uint64_t *slots, unsigned n)
    void vj_clear(vj_t *vj)
    uint64_t vj_load(const vj_t *vj, unsigned word)


cdef class Table:
    cdef vt_t vt
    cdef void *mapping
    cdef size_t size
    cdef readonly bint writable

    cdef int check_open(self) except -1
    cdef int check_writable(self) except -1
    cdef uint64_t checked_slot(self, slot) except? 0


cdef class Journal:
    cdef vj_t vj
    cdef void *mapping
    cdef int fd
    cdef readonly uint64_t backend_id

    cdef int check_open(self) except -1
