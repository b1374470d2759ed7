/*
 * The version table and a backend's journal lane: layout and hot operations (docs/reference/table.md).
 *
 * Everything here is C11 atomics on 64-bit little-endian words in memory that several processes share.
 * A mapping is checked once, by the Table class in table.pyx; nothing below fails or calls the system.
 */
#ifndef COHERENCE_TABLE_H
#define COHERENCE_TABLE_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the version table is little-endian");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock-free to work across processes");

/* Header: offsets in words. Sequence and floor each have a cache line of their own. */
enum {
    VT_WORD_MAGIC = 0,
    VT_WORD_ABI = 1,
    VT_WORD_SLOT_COUNT = 2,
    VT_WORD_SEED = 4,    /* 2 words */
    VT_WORD_DOMAIN = 6,  /* 2 words */
    VT_WORD_SEQUENCE = 8,
    VT_WORD_FLOOR = 16,
    VT_WORD_ROOT_EPOCH = 24,
    VT_WORD_ROOTS = 32,  /* a bit for each inode slot, which those with the same low bits share */
    VT_WORD_SLOTS = 512, /* byte 4096 */
    VT_ROOT_BITS = 16384,
    VT_BITS_MIN = 10,
    VT_BITS_MAX = 24,
    VT_ABI = 2,
};
#define VT_MAGIC UINT64_C(0x004c424154534656) /* the bytes "VFSTABL\0" */
#define VT_DISTRUST UINT64_MAX

typedef struct vt {
    _Atomic uint64_t *words;
    uint64_t slot_count, mask;
    unsigned bits; /* log2(slot_count) */
    uint64_t k0, k1;
} vt_t;

static inline uint64_t vt_load(const vt_t *vt, unsigned word)
{
    return atomic_load_explicit(&vt->words[word], memory_order_acquire);
}

static inline void vt_store(vt_t *vt, unsigned word, uint64_t value)
{
    atomic_store_explicit(&vt->words[word], value, memory_order_release);
}

/* Slots may come from a guest's node id or another process's journal: the mask keeps any of them inside. */
static inline _Atomic uint64_t *vt_slot(const vt_t *vt, uint64_t slot)
{
    return &vt->words[VT_WORD_SLOTS + (slot & vt->mask)];
}

/* Use a mapping whose header holds slot count and seed. */
static inline void vt_attach(vt_t *vt, void *mapping)
{
    vt->words = (_Atomic uint64_t *)mapping;
    vt->slot_count = vt_load(vt, VT_WORD_SLOT_COUNT);
    vt->mask = vt->slot_count - 1;
    vt->bits = (unsigned)__builtin_ctzll(vt->slot_count);
    vt->k0 = vt_load(vt, VT_WORD_SEED);
    vt->k1 = vt_load(vt, VT_WORD_SEED + 1);
}

#define VT_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define VT_SIPROUND(v)                                                                                    \
    do {                                                                                                  \
        v[0] += v[1]; v[1] = VT_ROTL(v[1], 13); v[1] ^= v[0]; v[0] = VT_ROTL(v[0], 32);                   \
        v[2] += v[3]; v[3] = VT_ROTL(v[3], 16); v[3] ^= v[2];                                             \
        v[0] += v[3]; v[3] = VT_ROTL(v[3], 21); v[3] ^= v[0];                                             \
        v[2] += v[1]; v[1] = VT_ROTL(v[1], 17); v[1] ^= v[2]; v[2] = VT_ROTL(v[2], 32);                   \
    } while (0)

static inline void vt_sip_word(uint64_t v[4], uint64_t word)
{
    v[3] ^= word;
    VT_SIPROUND(v);
    VT_SIPROUND(v);
    v[0] ^= word;
}

/*
 * SipHash-2-4 (Aumasson and Bernstein; the kernel's siphash()) of the message `first`, as 8 bytes, then
 * `data`. The kernel's siphash_2u64(first, second, key) is the same with `data` the 8 bytes of `second`.
 */
static inline uint64_t vt_siphash(const vt_t *vt, uint64_t first, const void *data, size_t len)
{
    const unsigned char *bytes = (const unsigned char *)data;
    uint64_t v[4] = {
        vt->k0 ^ UINT64_C(0x736f6d6570736575), vt->k1 ^ UINT64_C(0x646f72616e646f6d),
        vt->k0 ^ UINT64_C(0x6c7967656e657261), vt->k1 ^ UINT64_C(0x7465646279746573),
    };
    uint64_t last = (uint64_t)(len + 8) << 56, word;

    vt_sip_word(v, first);
    for (; len >= 8; len -= 8, bytes += 8) {
        memcpy(&word, bytes, 8);
        vt_sip_word(v, word);
    }
    word = 0;
    memcpy(&word, bytes, len);
    vt_sip_word(v, last | word);
    v[2] ^= 0xff;
    VT_SIPROUND(v);
    VT_SIPROUND(v);
    VT_SIPROUND(v);
    VT_SIPROUND(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The low bits of a hash are the slot; leases tell things of one slot apart by the others. */
static inline uint64_t vt_inode_hash(const vt_t *vt, uint64_t dev, uint64_t ino)
{
    return vt_siphash(vt, dev, &ino, sizeof ino);
}

static inline uint64_t vt_inode_slot(const vt_t *vt, uint64_t dev, uint64_t ino)
{
    return vt_inode_hash(vt, dev, ino) & vt->mask;
}

static inline uint64_t vt_name_hash(const vt_t *vt, uint64_t dir_slot, const char *name, size_t len)
{
    return vt_siphash(vt, dir_slot, name, len);
}

static inline uint64_t vt_name_slot(const vt_t *vt, uint64_t dir_slot, const char *name, size_t len)
{
    return vt_name_hash(vt, dir_slot, name, len) & vt->mask;
}

/* After the change took effect and before it is acknowledged. Returns the new sequence. */
static inline uint64_t vt_bump(vt_t *vt, uint64_t slot)
{
    _Atomic uint64_t *word = vt_slot(vt, slot);
    uint64_t g = atomic_fetch_add(&vt->words[VT_WORD_SEQUENCE], 1) + 1;
    uint64_t old = atomic_load_explicit(word, memory_order_relaxed);

    while (old < g && !atomic_compare_exchange_weak(word, &old, g))
        ;
    return g;
}

/* Nothing that depends on the slot is good until vt_unpin: it changes without bumps, as by stores into a mapping. */
static inline void vt_pin(vt_t *vt, uint64_t slot)
{
    atomic_store(vt_slot(vt, slot), UINT64_MAX);
}

static inline int vt_is_pinned(const vt_t *vt, uint64_t slot)
{
    return atomic_load(vt_slot(vt, slot)) == UINT64_MAX;
}

/* Good again is what is fetched from now on. Nobody may be in the middle of a change: its bump would be lost. */
static inline void vt_unpin(vt_t *vt, uint64_t slot)
{
    if (vt_is_pinned(vt, slot))
        atomic_store(vt_slot(vt, slot), atomic_fetch_add(&vt->words[VT_WORD_SEQUENCE], 1) + 1);
}

/* Before the request that fetches what is to be cached is sent. */
static inline uint64_t vt_stamp(const vt_t *vt)
{
    return vt_load(vt, VT_WORD_SEQUENCE);
}

static inline int vt_valid(const vt_t *vt, uint64_t slot, uint64_t stamp)
{
    return atomic_load_explicit(vt_slot(vt, slot), memory_order_acquire) <= stamp &&
           vt_load(vt, VT_WORD_FLOOR) <= stamp;
}

/*
 * Whether the slot may be the inode slot of some share's root: then slot 1 (node id 1) must be bumped too. It may be
 * another's, or that of a share that is no more: a needless bump does no harm.
 */
static inline int vt_is_root(const vt_t *vt, uint64_t slot)
{
    unsigned bit = (unsigned)slot % VT_ROOT_BITS;

    return vt_load(vt, VT_WORD_ROOTS + bit / 64) >> bit % 64 & 1;
}

/*
 * Only coherenced does. The bit comes first: whoever begins a change in the new epoch sees it, and whoever began one in
 * an older epoch sees that the epoch is another at the end, and cannot know whether slot 1 had to be bumped.
 */
static inline void vt_add_root(vt_t *vt, uint64_t slot)
{
    unsigned bit = (unsigned)slot % VT_ROOT_BITS;

    if (vt_is_root(vt, slot))
        return;
    atomic_fetch_or(&vt->words[VT_WORD_ROOTS + bit / 64], UINT64_C(1) << bit % 64);
    atomic_fetch_add(&vt->words[VT_WORD_ROOT_EPOCH], 1);
}

/*
 * A floor with the highest bit set is a distrust. vt_lift_floor takes one off such a floor, so that a
 * vt_raise_floor on its way, whose sequence number may be too low for that change, begins again.
 */
static inline int vt_distrusted(uint64_t floor)
{
    return floor >> 63 != 0;
}

/* Invalidate everything older than now. A distrust, and a higher floor, stay. */
static inline void vt_lift_floor(vt_t *vt)
{
    _Atomic uint64_t *floor = &vt->words[VT_WORD_FLOOR];
    uint64_t g = atomic_fetch_add(&vt->words[VT_WORD_SEQUENCE], 1) + 1;
    uint64_t old = atomic_load(floor);

    while ((vt_distrusted(old) || old < g) &&
           !atomic_compare_exchange_weak(floor, &old, vt_distrusted(old) ? old - 1 : g))
        ;
}

/* The same, and end a distrust, which is why only coherenced calls it. */
static inline void vt_raise_floor(vt_t *vt)
{
    _Atomic uint64_t *floor = &vt->words[VT_WORD_FLOOR];
    uint64_t old, g;

    do {
        old = atomic_load(floor);
        g = atomic_fetch_add(&vt->words[VT_WORD_SEQUENCE], 1) + 1;
    } while (!atomic_compare_exchange_strong(floor, &old, g));
}

static inline void vt_distrust(vt_t *vt)
{
    _Atomic uint64_t *floor = &vt->words[VT_WORD_FLOOR];
    uint64_t old = atomic_load(floor);

    while (!vt_distrusted(old) && !atomic_compare_exchange_weak(floor, &old, VT_DISTRUST))
        ;
}

/*
 * A backend's journal: a page of shared memory of its own, so that no backend can spoil another's. A header
 * that coherenced writes, but for the count of changes; then the lane: word 0 how many slots are about to be
 * changed, words 1 to VJ_MAX which.
 */
enum {
    VJ_WORD_MAGIC = 0,
    VJ_WORD_ABI = 1,
    VJ_WORD_DOMAIN = 6,  /* 2 words, those of the table */
    VJ_WORD_BACKEND = 8,  /* the backend's number in the lease table */
    VJ_WORD_CHANGES = 9, /* how many changes it has made; written with pwrite(2), which the host watch sees */
    VJ_WORD_LANE = 16,   /* byte 128: two cache lines */
    VJ_BYTES = 4096,
    VJ_MAX = 15,
    VJ_ABI = 2,
};
#define VJ_MAGIC UINT64_C(0x004c4e524a534656) /* the bytes "VFSJRNL\0" */

typedef struct vj {
    _Atomic uint64_t *lane;
} vj_t;

/*
 * Before the system call. More slots than fit are announced by their number alone: whoever reads a count
 * above VJ_MAX must take everything as changed.
 */
static inline void vj_announce(vj_t *vj, const uint64_t *slots, unsigned n)
{
    for (unsigned i = 0; i < n && i < VJ_MAX; i++)
        atomic_store_explicit(&vj->lane[1 + i], slots[i], memory_order_relaxed);
    atomic_store_explicit(&vj->lane[0], n, memory_order_release);
    /* A killed process leaves its stores as executed: only the compiler must not move the call before them. */
    atomic_signal_fence(memory_order_seq_cst);
}

/* After the bumps. */
static inline void vj_clear(vj_t *vj)
{
    atomic_store_explicit(&vj->lane[0], 0, memory_order_release);
}

static inline void vj_attach(vj_t *vj, void *lane)
{
    vj->lane = (_Atomic uint64_t *)lane;
}

static inline uint64_t vj_load(const vj_t *vj, unsigned word)
{
    return atomic_load_explicit(&vj->lane[word], memory_order_acquire);
}

#endif
