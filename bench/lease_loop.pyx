# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: extra_compile_args = -O3 -std=gnu11
"""The compiled path of the lease table, for bench/test_leases.py and tests/unit/coherence: loops, and single
operations at a time that the caller gives."""

from coherent_vfs.coherence.shm.leases cimport (
    Leases, lb_close, lb_free_since, lb_leased_until, lb_lock, lb_open, lb_quiet_for, lb_t, lb_unlock, lt_bucket,
    lt_data_since, lt_grant, lt_now, lt_set_origin,
)
from coherent_vfs.coherence.shm.table cimport Table, vt_bump, vt_stamp, vt_t

from libc.stdint cimport uint64_t
from posix.unistd cimport usleep


cdef extern from "leases.h" nogil:
    uint64_t lb_time(uint64_t lock)
    bint lb_write_lease(lb_t *bucket, uint64_t hash, uint64_t me, uint64_t now, uint64_t until)


cdef extern from *:
    """
    #define shared_load(words, word) __atomic_load_n(&(words)[word], __ATOMIC_SEQ_CST)
    #define shared_store(words, word, value) __atomic_store_n(&(words)[word], value, __ATOMIC_SEQ_CST)
    #define keep_going() __asm__ volatile("" ::: "memory")
    """
    uint64_t shared_load(uint64_t *words, unsigned word) nogil
    void shared_store(uint64_t *words, unsigned word, uint64_t value) nogil
    void keep_going() nogil

cdef enum:
    VALUE
    ACKNOWLEDGED
    MET
    DONE
    LEASE_US = 200  # at most
    CLOSED_US = 20  # beyond the end of a lease that is waited for


cdef void pause(uint64_t *random) noexcept nogil:
    """For 0 to 1023 turns of a loop."""
    cdef uint64_t i
    random[0] ^= random[0] << 13
    random[0] ^= random[0] >> 7
    random[0] ^= random[0] << 17
    for i in range(random[0] & 1023):
        keep_going()


# --- benchmarks -------------------------------------------------------------------------------------------

def grant(Leases leases, uint64_t hash, uint64_t me, uint64_t iterations):
    cdef vt_t *vt = &(<Table>leases.table).vt
    cdef uint64_t i, given = 0, now = lt_now()
    leases.check(0)
    with nogil:
        for i in range(iterations):
            given += lt_grant(&leases.lt, vt, hash, me, vt_stamp(vt), now, now + 1000 + i)
    return given


def lock(Leases leases, uint64_t hash, uint64_t me, uint64_t iterations):
    cdef uint64_t i, now, mine, old = 0, done = 0
    cdef lb_t *bucket
    leases.check(0)
    bucket = lt_bucket(&leases.lt, hash)
    with nogil:
        for i in range(iterations):
            now = lt_now()
            mine = lb_lock(bucket, me, now, &old)
            if mine != 0 and lb_leased_until(bucket, hash, me, now) == 0:
                done += lb_unlock(bucket, mine, lb_free_since(now))
    return done


# --- a race ------------------------------------------------------------------------------------------------

def use(Leases leases, uint64_t[::1] shared, uint64_t hash, uint64_t me, bint second_look, uint64_t meetings):
    cdef vt_t *vt = &(<Table>leases.table).vt
    cdef uint64_t *words = &shared[0]
    cdef uint64_t stamp, seen, acknowledged, now, until, leased = 0, random = 88172645463325252
    cdef lb_t *bucket
    cdef bint given, stale = False
    leases.check(0)
    bucket = lt_bucket(&leases.lt, hash)
    with nogil:
        while not stale and shared_load(words, MET) < meetings:
            stamp = vt_stamp(vt)
            seen = shared_load(words, VALUE)
            pause(&random)
            now = lt_now()
            until = now + 1 + random % LEASE_US
            if second_look:
                given = lt_grant(&leases.lt, vt, hash, me, stamp, now, until)
            else:
                given = lb_open(bucket, me, now) and lb_write_lease(bucket, hash, me, now, until)
            if not given:
                continue
            leased += 1
            while True:
                acknowledged = shared_load(words, ACKNOWLEDGED)
                if lt_now() >= until:
                    break
                if seen < acknowledged:
                    stale = True
                    break
        shared_store(words, DONE, 1)
    return leased, stale


def change(Leases leases, uint64_t[::1] shared, uint64_t hash, uint64_t me, bint wait):
    cdef vt_t *vt = &(<Table>leases.table).vt
    cdef uint64_t *words = &shared[0]
    cdef uint64_t mine, now, until, made = 0, met = 0, old = 0, random = 3935559000370003845
    cdef lb_t *bucket
    leases.check(0)
    bucket = lt_bucket(&leases.lt, hash)
    with nogil:
        while not shared_load(words, DONE):
            pause(&random)
            now = lt_now()
            mine = lb_lock(bucket, me, now, &old)
            if mine == 0:
                continue
            until = lb_leased_until(bucket, hash, me, now)
            if until != 0:
                met += 1
                shared_store(words, MET, met)
                if wait:
                    lb_close(bucket, until + CLOSED_US)
                    lb_unlock(bucket, mine, old)
                    while lt_now() < until:
                        usleep(50)
                    continue
            made += 1
            shared_store(words, VALUE, made)
            vt_bump(vt, hash)
            now = lt_now()
            lb_unlock(bucket, mine, lb_free_since(now))
            if lb_time(mine) <= now:
                # On a machine that stood still for 10 seconds somebody may have a lease on what was old.
                usleep(LEASE_US)
            shared_store(words, ACKNOWLEDGED, made)
    return made


# --- operations at a given time ---------------------------------------------------------------------------

def now():
    return lt_now()


def grant_at(Leases leases, uint64_t hash, uint64_t me, uint64_t stamp, uint64_t now, uint64_t until):
    leases.check(0)
    return lt_grant(&leases.lt, &(<Table>leases.table).vt, hash, me, stamp, now, until)


def leased_until_at(Leases leases, uint64_t hash, uint64_t me, uint64_t now):
    leases.check(0)
    return lb_leased_until(lt_bucket(&leases.lt, hash), hash, me, now)


def lock_at(Leases leases, uint64_t hash, uint64_t me, uint64_t now):
    cdef uint64_t old = 0
    leases.check(0)
    return lb_lock(lt_bucket(&leases.lt, hash), me, now, &old), old


def unlock(Leases leases, uint64_t hash, uint64_t mine, uint64_t next):
    leases.check(0)
    return lb_unlock(lt_bucket(&leases.lt, hash), mine, next)


def quiet_for(Leases leases, uint64_t hash, uint64_t now):
    leases.check(0)
    return lb_quiet_for(lt_bucket(&leases.lt, hash), now)


def set_origin(Leases leases, slot, uint64_t me, uint64_t number):
    leases.check(slot)
    lt_set_origin(&leases.lt, slot, me, number)


def data_since(Leases leases, slot, uint64_t stamp):
    leases.check(slot)
    return lt_data_since(&leases.lt, slot, stamp)
