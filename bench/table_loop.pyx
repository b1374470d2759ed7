# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""Loops over the compiled path of the version table, for bench/test_table.py and tests/unit/coherence."""

from coherent_vfs.coherence.shm.table cimport VT_WORD_SLOTS, Table, vt_bump, vt_load, vt_stamp, vt_valid

from libc.stdint cimport uint64_t


def bump(Table table, uint64_t slot, uint64_t iterations):
    cdef uint64_t i, last = 0
    table.check_writable()
    with nogil:
        for i in range(iterations):
            last = vt_bump(&table.vt, slot)
    return last


def check(Table table, uint64_t slot, uint64_t iterations):
    cdef uint64_t i, good = 0, stamp
    table.check_open()
    with nogil:
        stamp = vt_stamp(&table.vt)
        for i in range(iterations):
            # Slots of different cache lines in turn, as a guest uses them.
            good += vt_valid(&table.vt, slot + (i & 255) * 8, stamp)
    return good


def hammer(Table table, uint64_t slots, uint64_t iterations):
    cdef uint64_t i, lost = 0, g
    table.check_writable()
    with nogil:
        for i in range(iterations):
            g = vt_bump(&table.vt, i % slots)
            lost += vt_load(&table.vt, <unsigned>(VT_WORD_SLOTS + i % slots)) < g
    return lost
