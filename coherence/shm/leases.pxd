# cython: language_level=3
"""The lease table for compiled code: `from coherent_vfs.coherence.shm.leases cimport Leases, lt_grant`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from coherent_vfs.coherence.shm.table cimport vt_t


cdef extern from "leases.h" nogil:
    enum:
        LT_WORD_MAGIC
        LT_WORD_ABI
        LT_WORD_BUCKETS
        LT_WORD_DOMAIN
        LT_WORD_NEXT_BACKEND
        LT_WORD_EPOCH
        LT_WORD_MARKERS
        LT_WORD_FIRST
        LT_ABI
        LT_WORD_CLOCK
        LB_SLOT_BITS
        LB_WORDS
        LT_BACKEND_MAX
        LT_MANY
    const uint64_t LT_MAGIC

    ctypedef struct lt_t:
        uint64_t mask
    ctypedef struct lb_t:
        pass

    void lt_attach(lt_t *lt, void *mapping, uint64_t buckets)
    uint64_t lt_load(const lt_t *lt, unsigned word)
    void lt_bump_epoch(lt_t *lt)
    void lt_want_markers(lt_t *lt, bint wanted)
    uint64_t lt_now()
    lb_t *lt_bucket(const lt_t *lt, uint64_t hash)

    uint64_t lb_word(lb_t *bucket)
    bint lb_locked(uint64_t lock, uint64_t now)
    uint64_t lb_lock(lb_t *bucket, uint64_t me, uint64_t now, uint64_t *old)
    bint lb_unlock(lb_t *bucket, uint64_t mine, uint64_t next)
    uint64_t lb_time(uint64_t lock)
    uint64_t lb_free_since(uint64_t now)
    void lb_release(lb_t *bucket, uint64_t backend_id, uint64_t now)
    void lb_note(lb_t *bucket, uint64_t now)
    bint lb_open(lb_t *bucket, uint64_t me, uint64_t now)

    uint64_t lb_leased_until(lb_t *bucket, uint64_t hash, uint64_t me, uint64_t now)
    bint lb_is_closed(lb_t *bucket, uint64_t now)
    bint lb_write_lease(lb_t *bucket, uint64_t hash, uint64_t me, uint64_t now, uint64_t until)
    void lb_close(lb_t *bucket, uint64_t until)
    bint lt_grant(
        const lt_t *lt, const vt_t *vt, uint64_t hash, uint64_t me, uint64_t stamp, uint64_t now, uint64_t until
    )
    uint64_t lb_quiet_for(lb_t *bucket, uint64_t now)

    void lt_set_origin(const lt_t *lt, uint64_t slot, uint64_t me, uint64_t number)
    uint64_t lt_origin(const lt_t *lt, uint64_t slot, uint64_t *number)
    void lt_set_data(const lt_t *lt, const vt_t *vt, uint64_t slot)
    bint lt_data_since(const lt_t *lt, uint64_t slot, uint64_t stamp)


cdef class Leases:
    cdef lt_t lt
    cdef readonly object table
    cdef void *mapping
    cdef size_t size

    cdef int check(self, slot) except -1
