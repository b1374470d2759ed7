# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""Loops over the compiled path of the version table, for bench/test_table.py and the hammer test."""

from coherence.table cimport Table, vt_bump, vt_stamp, vt_valid

from libc.stdint cimport uint64_t


def bump(Table table, uint64_t slot, uint64_t iterations):
    """Bump `slot` so many times; returns the last sequence. PermissionError on a read-only table."""
    cdef uint64_t i, last = 0
    table.check_writable()
    with nogil:
        for i in range(iterations):
            last = vt_bump(&table.vt, slot)
    return last


def check(Table table, uint64_t slot, uint64_t iterations):
    """Stamp once and check `slot` so many times; returns how many checks said that it is good."""
    cdef uint64_t i, good = 0, stamp
    table.check_open()
    with nogil:
        stamp = vt_stamp(&table.vt)
        for i in range(iterations):
            # Another slot each time, as a guest does: else the compiler and the cache flatter us.
            good += vt_valid(&table.vt, slot + i * 64, stamp)
    return good
