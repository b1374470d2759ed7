"""Ordered access to the words of a split virtqueue that device and driver share (virtio 1.2, 2.7.13)."""

from libc.stdint cimport uint16_t

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint16_t load_acquire_16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
    static inline void store_release_16(uint16_t *word, uint16_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
    static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    uint16_t load_acquire_16(const uint16_t *word) noexcept nogil
    void store_release_16(uint16_t *word, uint16_t value) noexcept nogil
    void full_fence() noexcept nogil
