/*
 * The lease table: who may rely on what until when, and who is changing what (docs/concepts/leases.md).
 *
 * Like the version table: C11 atomics on 64-bit words that several processes share; nothing here fails or
 * calls the system. Times are CLOCK_MONOTONIC of whoever made the table, microseconds: processes whose time namespace
 * has another clock are refused. A hash is that of vt_inode_hash or vt_name_hash.
 */
#ifndef COHERENCE_LEASES_H
#define COHERENCE_LEASES_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "table.h"

enum {
    LT_WORD_MAGIC = 0,
    LT_WORD_ABI = 1,
    LT_WORD_BUCKETS = 2,
    LT_WORD_DOMAIN = 6,     /* 2 words, those of the table */
    LT_WORD_NEXT_BACKEND = 8,
    LT_WORD_EPOCH = 16,     /* of the host watch: what was watched in an older one may not be any more */
    LT_WORD_MARKERS = 17,   /* whether the host watch wants to be told of each change in the journals */
    LT_WORD_CLOCK = 18,     /* what its maker's time namespace adds to CLOCK_MONOTONIC, nanoseconds, signed */
    LT_WORD_FIRST = 512,    /* byte 4096: the buckets */
    LT_ABI = 2,

    LB_LOCK = 0,
    LB_CLOSED = 1,
    LB_ORIGIN = 2,
    LB_DATA = 3,
    LB_LEASE = 4,
    LB_WORDS = 8,
    LB_SLOT_BITS = 2,       /* four slots share a bucket */

    LT_BACKEND_BITS = 10,
    LT_BACKEND_MAX = (1 << LT_BACKEND_BITS) - 2,
    LT_MANY = (1 << LT_BACKEND_BITS) - 1,
    LT_TAG_BITS = 14,
    LT_UNTIL_SHIFT = LT_BACKEND_BITS + LT_TAG_BITS,
    LT_UNTIL_US_BITS = 10,  /* a lease's end is kept in units of 1024 microseconds */
    LT_LOCK_US = 10000000,
};
/* The last end of a lease that fits: 35 years after the machine started. */
#define LT_UNTIL_MAX ((UINT64_C(1) << (64 - LT_UNTIL_SHIFT + LT_UNTIL_US_BITS)) - (1 << LT_UNTIL_US_BITS))
#define LT_MAGIC UINT64_C(0x00455341454c4656) /* the bytes "VFLEASE\0" */

typedef struct lt {
    _Atomic uint64_t *words;
    uint64_t mask;
} lt_t;

typedef _Atomic uint64_t lb_t;

static inline void lt_attach(lt_t *lt, void *mapping, uint64_t buckets)
{
    lt->words = (_Atomic uint64_t *)mapping;
    lt->mask = buckets - 1;
}

static inline uint64_t lt_load(const lt_t *lt, unsigned word)
{
    return atomic_load(&lt->words[word]);
}

static inline void lt_bump_epoch(lt_t *lt)
{
    atomic_fetch_add(&lt->words[LT_WORD_EPOCH], 1);
}

static inline void lt_want_markers(lt_t *lt, int wanted)
{
    atomic_store(&lt->words[LT_WORD_MARKERS], wanted);
}

static inline uint64_t lt_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* The bucket of a hash, or of a slot: both have the same low bits. */
static inline lb_t *lt_bucket(const lt_t *lt, uint64_t hash)
{
    return &lt->words[LT_WORD_FIRST + (hash & lt->mask) * LB_WORDS];
}

static inline uint64_t lt_tag(uint64_t hash)
{
    return hash >> (64 - LT_TAG_BITS);
}

/* --- the lock ----------------------------------------------------------------------------------------- */

static inline uint64_t lb_backend(uint64_t word)
{
    return word & LT_MANY;
}

static inline uint64_t lb_time(uint64_t lock)
{
    return lock >> LT_BACKEND_BITS;
}

static inline uint64_t lb_word(lb_t *bucket)
{
    return atomic_load(&bucket[LB_LOCK]);
}

static inline int lb_locked(uint64_t lock, uint64_t now)
{
    return lb_backend(lock) != 0 && lb_time(lock) > now;
}

/* Lock a bucket that the caller has not locked. Gives 0, or what lb_unlock wants, with *old as it was. */
static inline uint64_t lb_lock(lb_t *bucket, uint64_t me, uint64_t now, uint64_t *old)
{
    uint64_t mine = me | (now + LT_LOCK_US) << LT_BACKEND_BITS;

    *old = atomic_load(&bucket[LB_LOCK]);
    do {
        if (lb_locked(*old, now))
            return 0;
    } while (!atomic_compare_exchange_weak(&bucket[LB_LOCK], old, mine));
    return mine;
}

/* Unlock, leaving another word. False where the lock was taken away, as it was held for too long. */
static inline int lb_unlock(lb_t *bucket, uint64_t mine, uint64_t next)
{
    return atomic_compare_exchange_strong(&bucket[LB_LOCK], &mine, next);
}

/* The word of a free lock: when the last change ended. */
static inline uint64_t lb_free_since(uint64_t now)
{
    return now << LT_BACKEND_BITS;
}

/* Unlock what a dead backend had locked. */
static inline void lb_release(lb_t *bucket, uint64_t backend_id, uint64_t now)
{
    uint64_t lock = lb_word(bucket);

    if (lb_backend(lock) == backend_id)
        atomic_compare_exchange_strong(&bucket[LB_LOCK], &lock, lb_free_since(now));
}

/* Note a change that needed no lock: one on the host. */
static inline void lb_note(lb_t *bucket, uint64_t now)
{
    uint64_t lock = lb_word(bucket);

    while (!lb_locked(lock, now) && !atomic_compare_exchange_weak(&bucket[LB_LOCK], &lock, lb_free_since(now)))
        ;
}

/* --- leases ------------------------------------------------------------------------------------------- */

static inline uint64_t lb_until(uint64_t lease)
{
    return lease >> LT_UNTIL_SHIFT << LT_UNTIL_US_BITS;
}

static inline uint64_t lb_lease_word(uint64_t backend_id, uint64_t tag, uint64_t until)
{
    uint64_t units = (until + (1 << LT_UNTIL_US_BITS) - 1) >> LT_UNTIL_US_BITS;

    return backend_id | tag << LT_BACKEND_BITS | units << LT_UNTIL_SHIFT;
}

static inline uint64_t lb_tag(uint64_t lease)
{
    return lease >> LT_BACKEND_BITS & ((1 << LT_TAG_BITS) - 1);
}

/* When the last lease of others on this hash ends; 0 when there is none. */
static inline uint64_t lb_leased_until(lb_t *bucket, uint64_t hash, uint64_t me, uint64_t now)
{
    uint64_t latest = 0;

    for (unsigned i = 0; i < LB_WORDS - LB_LEASE; i++) {
        uint64_t lease = atomic_load(&bucket[LB_LEASE + i]);

        if (lb_backend(lease) != 0 && lb_backend(lease) != me && lb_tag(lease) == lt_tag(hash) &&
            lb_until(lease) > now && lb_until(lease) > latest)
            latest = lb_until(lease);
    }
    return latest;
}

/* Give no new leases until then, as a change waits. */
static inline void lb_close(lb_t *bucket, uint64_t until)
{
    uint64_t old = atomic_load(&bucket[LB_CLOSED]);

    while (old < until && !atomic_compare_exchange_weak(&bucket[LB_CLOSED], &old, until))
        ;
}

enum { OWN, FREE, SHARED };

static inline int lb_cell_fits(uint64_t lease, int round, uint64_t tag, uint64_t me, uint64_t now)
{
    int live = lb_backend(lease) != 0 && lb_until(lease) > now;

    if (round == FREE)
        return !live;
    return live && lb_tag(lease) == tag && (round == SHARED || lb_backend(lease) == me);
}

/* Write a lease into a cell: an own one, a free one, or one of the same thing that is then of many. */
static inline int lb_write_lease(lb_t *bucket, uint64_t hash, uint64_t me, uint64_t now, uint64_t until)
{
    uint64_t tag = lt_tag(hash);

    if (until > LT_UNTIL_MAX)
        return 0;
    for (int round = OWN; round <= SHARED; round++)
        for (unsigned i = 0; i < LB_WORDS - LB_LEASE; i++) {
            uint64_t old = atomic_load(&bucket[LB_LEASE + i]);

            while (lb_cell_fits(old, round, tag, me, now)) {
                uint64_t end = round != FREE && lb_until(old) > until ? lb_until(old) : until;

                if (atomic_compare_exchange_weak(&bucket[LB_LEASE + i], &old,
                                                 lb_lease_word(round == SHARED ? LT_MANY : me, tag, end)))
                    return 1;
            }
        }
    return 0;
}

static inline int lb_locked_by_another(lb_t *bucket, uint64_t me, uint64_t now)
{
    uint64_t lock = lb_word(bucket);

    return lb_locked(lock, now) && lb_backend(lock) != me;
}

static inline int lb_is_closed(lb_t *bucket, uint64_t now)
{
    return atomic_load(&bucket[LB_CLOSED]) > now;
}

/* Whether nothing speaks against a lease: no change by another, none that waits. */
static inline int lb_open(lb_t *bucket, uint64_t me, uint64_t now)
{
    return !lb_locked_by_another(bucket, me, now) && !lb_is_closed(bucket, now);
}

/*
 * Give `me` a lease on what it fetched after it took the stamp. The end is written before the second look, so
 * either a changer sees the lease, or the changer's lock or bump is seen here.
 */
static inline int lt_grant(const lt_t *lt, const vt_t *vt, uint64_t hash, uint64_t me, uint64_t stamp, uint64_t now,
                           uint64_t until)
{
    lb_t *bucket = lt_bucket(lt, hash);

    if (!lb_open(bucket, me, now) || !vt_valid(vt, hash & vt->mask, stamp) ||
        !lb_write_lease(bucket, hash, me, now, until))
        return 0;
    atomic_thread_fence(memory_order_seq_cst);
    return lb_open(bucket, me, now) && vt_valid(vt, hash & vt->mask, stamp);
}

/* Microseconds since the last change of anything in the bucket, or since a dead backend's lock on it was over. */
static inline uint64_t lb_quiet_for(lb_t *bucket, uint64_t now)
{
    uint64_t lock = lb_word(bucket);

    return lb_time(lock) < now ? now - lb_time(lock) : 0;
}

/* --- origin and data ---------------------------------------------------------------------------------- */

enum { LB_ORIGIN_SHIFT = LT_BACKEND_BITS + LB_SLOT_BITS };

/* Which of the slots that share a bucket this one is. */
static inline uint64_t lt_part(const lt_t *lt, uint64_t slot)
{
    return slot / (lt->mask + 1) & ((1 << LB_SLOT_BITS) - 1);
}

/* A slot that is inside the table: who changes it, by the how manieth of its changes. */
static inline void lt_set_origin(const lt_t *lt, uint64_t slot, uint64_t me, uint64_t number)
{
    atomic_store(&lt_bucket(lt, slot)[LB_ORIGIN], me | lt_part(lt, slot) << LT_BACKEND_BITS | number << LB_ORIGIN_SHIFT);
}

/* The backend of the last change of a slot, with its number; 0 where another slot's has replaced it. */
static inline uint64_t lt_origin(const lt_t *lt, uint64_t slot, uint64_t *number)
{
    uint64_t origin = atomic_load(&lt_bucket(lt, slot)[LB_ORIGIN]);

    *number = origin >> LB_ORIGIN_SHIFT;
    return (origin >> LT_BACKEND_BITS & ((1 << LB_SLOT_BITS) - 1)) == lt_part(lt, slot) ? lb_backend(origin) : 0;
}

/*
 * The data of a file, or the list of a directory, has changed: after that, and before the bump. The word ends up above
 * every stamp that was taken before it was written, also where other bumps come in between.
 */
static inline void lt_set_data(const lt_t *lt, const vt_t *vt, uint64_t slot)
{
    lb_t *word = &lt_bucket(lt, slot)[LB_DATA];
    uint64_t next, old = atomic_load(word);

    do {
        next = vt_stamp(vt) + 1;
        while (old < next && !atomic_compare_exchange_weak(word, &old, next))
            ;
        atomic_thread_fence(memory_order_seq_cst);
    } while (vt_stamp(vt) >= next);
}

/* Whether some data in the bucket changed since what was told with this stamp. Ask before the host is asked. */
static inline int lt_data_since(const lt_t *lt, uint64_t slot, uint64_t stamp)
{
    return atomic_load(&lt_bucket(lt, slot)[LB_DATA]) > stamp;
}

#endif
