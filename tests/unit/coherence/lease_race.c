/*
 * Two processes at one bucket of the lease table, switched at every possible moment: each atomic access in leases.h
 * and table.h first gives the other a chance, and every schedule with up to three switches is tried.
 *
 * usage: lease_race SCENARIO [MISTAKE]. Exit status 1: a schedule with a forbidden outcome was found, and is printed.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

static void step(void);
static uint64_t clock_us;

static uint64_t load(const _Atomic uint64_t *word)
{
    step();
    return atomic_load_explicit((_Atomic uint64_t *)word, memory_order_seq_cst);
}

static void store(_Atomic uint64_t *word, uint64_t value)
{
    step();
    atomic_store_explicit(word, value, memory_order_seq_cst);
}

static uint64_t add(_Atomic uint64_t *word, uint64_t more)
{
    step();
    return atomic_fetch_add_explicit(word, more, memory_order_seq_cst);
}

static int exchange(_Atomic uint64_t *word, uint64_t *old, uint64_t value)
{
    step();
    return atomic_compare_exchange_strong_explicit(word, old, value, memory_order_seq_cst, memory_order_seq_cst);
}

static int read_clock(struct timespec *now)
{
    step();
    now->tv_sec = (time_t)(clock_us / 1000000);
    now->tv_nsec = (long)(clock_us % 1000000 * 1000);
    return 0;
}

#undef atomic_load
#undef atomic_load_explicit
#undef atomic_store
#undef atomic_store_explicit
#undef atomic_fetch_add
#undef atomic_compare_exchange_weak
#undef atomic_compare_exchange_strong
#define atomic_load(word) load(word)
#define atomic_load_explicit(word, order) load(word)
#define atomic_store(word, value) store(word, value)
#define atomic_store_explicit(word, value, order) store(word, value)
#define atomic_fetch_add(word, more) add(word, more)
#define atomic_compare_exchange_weak(word, old, value) exchange(word, old, value)
#define atomic_compare_exchange_strong(word, old, value) exchange(word, old, value)
#define clock_gettime(id, now) read_clock(now)
#include "leases.h"

enum { SLOTS = 4, MAX_STEPS = 60, NOW = 5000, UNTIL = 900000, READER = 1, CHANGER = 2, DEAD = 7 };
#define HASH (UINT64_C(0xabcde) << 44 | 1)

static _Atomic uint64_t table_words[VT_WORD_SLOTS + SLOTS], lease_words[LT_WORD_FIRST + LB_WORDS], value;
static vt_t vt;
static lt_t lt;
static lb_t *bucket;
static const char *mistake = "";
static int variant; /* of a scenario: the bucket's state at the beginning */

static int makes(const char *name)
{
    return strcmp(mistake, name) == 0;
}

/* What came of it. */
static uint64_t got, seen, told, mine;
static int granted, also_granted, changed, acknowledged;

/* --- a guest gets a lease, another's change is acknowledged ----------------------------------------- */

static void read_and_grant(void)
{
    uint64_t stamp = vt_stamp(&vt), now;

    seen = load(&value);
    if (makes("stamp-after-reply"))
        stamp = vt_stamp(&vt);
    now = lt_now();
    if (makes("no-second-look"))
        granted = lb_open(bucket, READER, now) && lb_write_lease(bucket, HASH, READER, now, now + UNTIL);
    else
        granted = lt_grant(&lt, &vt, HASH, READER, stamp, now, now + UNTIL);
}

static int unlock_in_time(void)
{
    int in_time = lb_time(mine) > lt_now() || makes("unlock-without-the-clock");

    return lb_unlock(bucket, mine, lb_free_since(clock_us)) && in_time;
}

static void change(void)
{
    uint64_t old = 0, now = lt_now();
    int held = 1;

    if (!makes("no-lock") && !(mine = lb_lock(bucket, CHANGER, now, &old)))
        return;
    if (!makes("no-lease-check") && lb_leased_until(bucket, HASH, CHANGER, now)) {
        lb_close(bucket, now + UNTIL);
        lb_unlock(bucket, mine, old);
        return;
    }
    store(&value, 1);
    if (makes("bump-after-unlock"))
        held = unlock_in_time();
    lt_set_data(&lt, &vt, HASH & vt.mask);
    vt_bump(&vt, HASH & vt.mask);
    if (!makes("bump-after-unlock") && !makes("no-lock"))
        held = unlock_in_time();
    acknowledged = held;
}

static int stale(void)
{
    return granted && seen == 0 && acknowledged;
}

/* The changer is stopped: by the time that the reader comes, its lock is over. */
static void come_late_and_grant(void)
{
    clock_us += LT_LOCK_US;
    read_and_grant();
}

/* --- data words: what a guest is told about its pages ------------------------------------------------ */

static void ask_for_data(void)
{
    uint64_t stamp;

    vt_bump(&vt, 2); /* somebody changes something else */
    stamp = vt_stamp(&vt);
    changed = lt_data_since(&lt, HASH & vt.mask, told);
    seen = load(&value);
    if (makes("stamp-after-reply"))
        stamp = vt_stamp(&vt);
    granted = lt_grant(&lt, &vt, HASH, READER, stamp, NOW, UNTIL);
    told = stamp;
}

static void change_on_the_host(void)
{
    store(&value, 1);
    lt_set_data(&lt, &vt, HASH & vt.mask);
    vt_bump(&vt, HASH & vt.mask);
}

static int pages_stay_old(void)
{
    int new_pages = changed && seen == 1;

    return !new_pages && !lt_data_since(&lt, HASH & vt.mask, told);
}

/* --- two leases at once ------------------------------------------------------------------------------ */

static void grant_one(void)
{
    granted = lt_grant(&lt, &vt, HASH, 3, vt_stamp(&vt), NOW, UNTIL);
}

static void grant_another(void)
{
    also_granted = lt_grant(&lt, &vt, HASH, 4, vt_stamp(&vt), NOW, 2 * UNTIL);
}

/* `variant` cells are taken by others' leases on the thing, the rest by such that are over. */
static void fill_cells(void)
{
    for (int i = 0; i < LB_WORDS - LB_LEASE; i++)
        atomic_init(&bucket[LB_LEASE + i], lb_lease_word(10 + (uint64_t)i, lt_tag(HASH), i < variant ? UNTIL : 1024));
}

static int lease_lost(void)
{
    return !granted || !also_granted || lb_leased_until(bucket, HASH, 4, NOW) < UNTIL ||
           lb_leased_until(bucket, HASH, 3, NOW) < 2 * UNTIL;
}

/* --- two at the lock --------------------------------------------------------------------------------- */

static void lock_it(void)
{
    uint64_t old;

    mine = lb_lock(bucket, CHANGER, NOW, &old);
}

static void lock_it_too(void)
{
    uint64_t old;

    got = lb_lock(bucket, READER, NOW, &old);
}

static void note(void)
{
    lb_note(bucket, NOW);
}

static void release_the_dead(void)
{
    lb_release(bucket, DEAD, NOW);
}

/* Free, or held by a dead backend: until lately, still. */
static void fill_lock(void)
{
    const uint64_t locks[] = {0, DEAD | (NOW - 1) << LT_BACKEND_BITS, DEAD | (NOW + 1) << LT_BACKEND_BITS};

    atomic_init(&bucket[LB_LOCK], locks[variant]);
}

static int lock_lost(void)
{
    return (mine != 0 && got != 0) || (mine != 0 && lb_word(bucket) != mine) || (got != 0 && lb_word(bucket) != got);
}

static void nothing(void)
{
}

static const struct scenario {
    const char *name;
    void (*first)(void), (*second)(void), (*fill)(void);
    int (*forbidden)(void);
    int variants;
} scenarios[] = {
    {"change", read_and_grant, change, nothing, stale, 1},
    {"stopped-change", come_late_and_grant, change, nothing, stale, 1},
    {"data", ask_for_data, change_on_the_host, nothing, pages_stay_old, 1},
    {"leases", grant_one, grant_another, fill_cells, lease_lost, 5},
    {"lock", lock_it, lock_it_too, fill_lock, lock_lost, 3},
    {"note", lock_it, note, fill_lock, lock_lost, 3},
    {"release", lock_it, release_the_dead, fill_lock, lock_lost, 3},
};

/* --- schedules --------------------------------------------------------------------------------------- */

static ucontext_t scheduler, process[2];
static char stacks[2][65536];
static int running = -1, done[2];
static const struct scenario *scenario;

static void step(void)
{
    if (running >= 0)
        swapcontext(&process[running], &scheduler);
}

static void run(void)
{
    (running == 0 ? scenario->first : scenario->second)();
    done[running] = 1;
}

/* Let a process make so many steps. False when it ended before. */
static int go(int which, int steps)
{
    running = which;
    for (int i = 0; i < steps && !done[which]; i++)
        swapcontext(&scheduler, &process[which]);
    running = -1;
    return !done[which];
}

static void begin(void)
{
    memset(table_words, 0, sizeof table_words);
    memset(lease_words, 0, sizeof lease_words);
    table_words[VT_WORD_SLOT_COUNT] = SLOTS;
    table_words[VT_WORD_SEQUENCE] = table_words[VT_WORD_FLOOR] = 1;
    vt_attach(&vt, table_words);
    lt_attach(&lt, lease_words, SLOTS >> LB_SLOT_BITS);
    bucket = lt_bucket(&lt, HASH);
    clock_us = NOW;
    value = seen = got = mine = 0;
    told = 1;
    granted = also_granted = changed = acknowledged = 0;
    scenario->fill();
    for (int i = 0; i < 2; i++) {
        done[i] = 0;
        getcontext(&process[i]);
        process[i].uc_stack.ss_sp = stacks[i];
        process[i].uc_stack.ss_size = sizeof stacks[i];
        process[i].uc_link = &scheduler;
        makecontext(&process[i], run, 0);
    }
}

static int try_schedules(int first)
{
    int second = !first, more = 1;

    for (int a = 0; a < MAX_STEPS && more; a++)
        for (int b = 0, b_more = 1; b < MAX_STEPS && b_more; b++)
            for (int c = 0, c_more = 1; c < MAX_STEPS && c_more; c++) {
                begin();
                more = go(first, a);
                b_more = go(second, b);
                c_more = go(first, c);
                go(second, MAX_STEPS);
                go(first, MAX_STEPS);
                if (!done[0] || !done[1] || scenario->forbidden()) {
                    printf("%s, variant %d: process %d makes %d steps, the other %d, the first %d, then the other ends\n",
                           scenario->name, variant, first, a, b, c);
                    return 1;
                }
            }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 2)
        mistake = argv[2];
    for (unsigned i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        if (argc > 1 && strcmp(argv[1], scenarios[i].name) == 0) {
            scenario = &scenarios[i];
            for (variant = 0; variant < scenario->variants; variant++)
                if (try_schedules(0) || try_schedules(1))
                    return 1;
            return 0;
        }
    return 2;
}
