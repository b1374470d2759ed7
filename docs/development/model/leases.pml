/*
 * Leases (docs/leases.md; coherence/leases.h): one thing, N backends, each with a stock guest.
 *
 * A backend serves its guest's reads, for ever, and the first CHANGERS of them CHANGES changes each, too. It does
 * one thing at a time.
 */
#include "common.pml"

#ifndef N
#define N 3
#endif
#ifndef CHANGERS
#define CHANGERS 2
#endif
#ifndef CHANGES
#define CHANGES 1
#endif
#define NOBODY 255

/* The bucket, and what a lease or a lock is in time: there, or over. */
byte lock = NOBODY;     /* who makes a change */
bool expired[N];        /* it has been this one's for 10 s: to others it is free */
bool closed;            /* no new leases, as a change waits */
bool lease[N];          /* of this holder */
bool giving[N];         /* written, but the reply is not out */
byte floor;

/* The guests. */
bool keeps[N];          /* it may use its copy */
byte copy[N];
bool older[N];          /* given before the floor was lifted */
bool wants[N];          /* it asked for a change */
bool parked[N];         /* which waits for leases */
bool amid[N];           /* which took effect, but the reply is not out */
byte seen;              /* the newest version that any guest was told of */

hidden byte k;

#ifdef STOPPED
#define newest acked
#else
#define newest MAX(acked, seen)
#endif

/* No guest may use anything older; but one that waits for its own change may use what it has until the reply. */
inline check()
{
    for (k : 0 .. N - 1) {
        assert(!keeps[k] || amid[k] || copy[k] >= newest)
    }
    k = 0
}

#define unlocked (lock == NOBODY || expired[lock])

#ifdef GIVE_WHILE_A_CHANGE_WAITS
#define is_open true
#else
#define is_open !closed
#endif

inline reply_to_read(valid)
{
    if
    :: valid -> keeps[me] = true; copy[me] = v; older[me] = false
    :: else
    fi;
    giving[me] = false;
    seen = MAX(seen, v);
    check();
    stamp = 0; v = 0; ok = false
}

inline read()
{
#ifdef STAMP_AFTER_THE_READ
    v = host;
    stamp = sequence;
#else
    stamp = sequence;
    v = host;
#endif
    ok = unlocked;
    ok = ok && is_open;
    if
    :: !ok -> d_step { reply_to_read(false) }
    :: else ->
        d_step { lease[me] = true; giving[me] = true };
#if defined(NO_SECOND_LOOK)
        d_step { reply_to_read(true) };
#elif defined(SLOT_BEFORE_LOCK)
        ok = slot <= stamp && floor <= stamp;
        ok = ok && is_open;
        d_step { ok = ok && unlocked; reply_to_read(ok) };
#else
        ok = unlocked;
        ok = ok && is_open;
        ok = ok && slot <= stamp;
#ifdef WITHDRAW
        if
        :: !ok -> lease[me] = false
        :: else
        fi;
#endif
        d_step { ok = ok && floor <= stamp; reply_to_read(ok) };
#endif
    fi
}

inline change()
{
    atomic { unlocked -> lock = me; expired[me] = false };
#ifndef NO_LOOK_FOR_LEASES
    for (i : 0 .. N - 1) {
        found = found || (i != me && lease[i])
    }
    i = 0;
#endif
    if
    :: found ->
        d_step { closed = true; parked[me] = true; found = false };
        d_step {
            if
            :: lock == me -> lock = NOBODY
            :: else
            fi
        }
    :: else ->
#ifdef BUMP_BEFORE_THE_CALL
        bump();
#endif
        d_step { host++; v = host; amid[me] = true };
#if defined(UNLOCK_BEFORE_BUMP)
        unlock();
        bump();
#elif defined(BUMP_BEFORE_THE_CALL)
        unlock();
#elif defined(REPLY_BEFORE_BUMP)
        reply_to_change();
        bump();
        unlock();
#else
        bump();
        unlock();
#endif
#ifndef REPLY_BEFORE_BUMP
        reply_to_change()
#endif
    fi
}

/* Where the lock was away, others may have given leases on what was before the change: outwait them. */
inline unlock()
{
    atomic {
        if
        :: lock == me && !expired[me] -> lock = NOBODY
#ifdef UNLOCK_WITHOUT_THE_CLOCK
        :: lock == me && expired[me] -> lock = NOBODY
#endif
        :: else ->
            found = true
        fi
    };
    if
    :: found ->
        found = false;
        atomic { sequence++; g = sequence };
        d_step {
            floor = MAX(floor, g);
            g = 0;
            for (k : 0 .. N - 1) { older[k] = keeps[k] && k != me }
            k = 0
        };
        /* One whole --lease-max. */
        wait_for_older()
    :: else
    fi
}

inline wait_for_older()
{
    for (i : 0 .. N - 1) {
#ifdef NEWER_LEASES_WAITED_FOR
        !lease[i] || i == me
#else
        !older[i]
#endif
    }
    i = 0
}

inline reply_to_change()
{
    d_step {
        acked = MAX(acked, v);
        seen = MAX(seen, v);
        amid[me] = false;
        keeps[me] = false;
        copy[me] = 0;
        older[me] = false;
        wants[me] = false;
        parked[me] = false;
        v = 0;
        check()
    }
}

#if N == 2
#define others_over(me) (!lease[1 - me])
#else
#define others_over(me) ((me == 0 || !lease[0]) && (me == 1 || !lease[1]) && (me == 2 || !lease[2]))
#endif

/* The loop serves what is due before what comes in. */
#define due(me) (wants[me] && unlocked && (!parked[me] || others_over(me)))

proctype backend(byte me)
{
    byte changes = (me < CHANGERS -> CHANGES : 0), stamp, v, g, i;
    bool ok, found;

    do
    :: due(me) -> change()
    :: !due(me) -> read()
    :: changes > 0 && !wants[me] -> d_step { changes--; wants[me] = true }
    od
}

/* The end of a lease; its reply came in time, and the guest used what it got to the last moment. */
proctype lease_clock(byte i)
{
    do
    :: d_step { lease[i] && !giving[i] -> lease[i] = false; keeps[i] = false; copy[i] = 0; older[i] = false;
#ifdef CLOSED_ENDS_WITH_THE_LEASES
        if
        :: !lease[0] && !lease[1] && !lease[N - 1] -> closed = false
        :: else
        fi;
#endif
        skip
    }
    od
}

proctype clock()
{
#if defined(STOPPED) || !defined(CLOSED_ENDS_WITH_THE_LEASES)
    do
#ifndef CLOSED_ENDS_WITH_THE_LEASES
    /* Closed is long enough for whoever waits to try again. */
    :: d_step { closed && !parked[0] && !parked[1] && !parked[N - 1] -> closed = false }
#endif
#ifdef STOPPED
    :: d_step { lock != NOBODY && !expired[lock] -> expired[lock] = true }
#endif
    od
#else
    skip
#endif
}

init
{
    atomic {
        for (k : 0 .. N - 1) {
            run backend(k);
            run lease_clock(k)
        }
        run clock()
    }
}

#ifdef LIVENESS
ltl change_is_made { [] (wants[0] -> <> !wants[0]) }
#endif
