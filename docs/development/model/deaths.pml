/*
 * Backends and the daemon die, at any point (docs/coherenced.md, "What happens when something dies").
 *
 * Two backends, the guests of which want one change each; the daemon, which is started again; and an aware guest with
 * one copy, fetched and used at any time, or, with STOCK, a stock guest of each backend that reads once. With NEWCOMER
 * another backend joins when the first was reaped.
 *
 * A dead backend's change counts as acknowledged once it is reaped, or once all the living have noticed that there
 * is no daemon that could do so.
 */
#include "common.pml"

#ifdef NEWCOMER
#define N 3
#else
#define N 2
#endif
#ifdef STOCK
#define READS 1
#else
#define READS 0
#endif
#ifndef CHANGERS
#define CHANGERS 2
#endif
#ifndef BACKEND_DEATHS
#define BACKEND_DEATHS 1
#endif
#ifndef DAEMON_DEATHS
#define DAEMON_DEATHS 1
#endif
#define NOBODY 255
#define DISTRUST 255

byte floor = 1;

/* The daemon; each has an epoch of its own. */
bool up = true;
byte epoch = 1;

/* The backends. */
bool dead[N];
bool reaped[N];
byte joined[N];     /* which daemon it is a member of; 0: it has noticed that there is none */
bool journal[N];    /* it announces the thing */
bool wants[N];      /* its guest asked for a change */
bool amid[N];       /* which took effect, but the reply is not out */
byte version[N];    /* and made this */

/* The bucket. Leases and lock go by the number of the holder, which is that of the backend. */
byte lock = NOBODY;
bool lease[N];
bool giving[N];     /* written, but the reply is not out */
bool keeps[N];      /* the stock guest may use its copy */
byte copy[N];

hidden byte k;

inline check()
{
    for (k : 0 .. N - 1) {
        assert(!keeps[k] || amid[k] || copy[k] >= acked)
    }
    k = 0
}

/* A change of a dead backend that got as far as the host. */
inline count_as_acknowledged(i)
{
    if
    :: amid[i] -> acked = MAX(acked, version[i])
    :: else
    fi
}

#if N == 2
#define leased_to_others(me) lease[1 - me]
#else
#define leased_to_others(me) ((me != 0 && lease[0]) || (me != 1 && lease[1]))
#endif

inline read()
{
    stamp = sequence;
    v = host;
    if
    :: lock == NOBODY ->
        d_step { lease[me] = true; giving[me] = true };
        ok = lock == NOBODY;
        ok = ok && slot <= stamp;
        d_step {
            if
            :: ok && floor <= stamp -> keeps[me] = true; copy[me] = v
            :: else
            fi;
            giving[me] = false;
            check()
        }
    :: else
    fi;
    d_step { stamp = 0; v = 0; ok = false }
}

inline change()
{
#ifndef ANNOUNCE_AFTER_CALL
    journal[me] = true;
#endif
    atomic {
        if
        :: lock == NOBODY -> lock = me; ok = true
        :: else
        fi
    };
    ok = ok && !leased_to_others(number);
    if
    :: !ok -> let_go()
    :: else ->
        d_step { host++; v = host; amid[me] = true; version[me] = v };
#ifdef ANNOUNCE_AFTER_CALL
        journal[me] = true;
#endif
#ifdef CLEAR_BEFORE_BUMP
        journal[me] = false;
#endif
        bump();
        let_go();
        d_step {
            acked = MAX(acked, v);
            amid[me] = false;
            version[me] = 0;
            keeps[me] = false;
            copy[me] = 0;
            wants[me] = false;
            v = 0;
            check()
        }
    fi;
    ok = false
}

inline let_go()
{
    d_step {
        if
        :: lock == me -> lock = NOBODY
        :: else
        fi
    };
    journal[me] = false
}

/* Its connection to the daemon has ended. */
inline notice()
{
#ifndef NO_DISTRUST
    floor = DISTRUST;
#endif
    d_step {
        joined[me] = 0;
        ok = true;
        for (k : 0 .. N - 1) {
            ok = ok && (dead[k] || joined[k] == 0 || joined[k] == epoch)
        }
        for (k : 0 .. N - 1) {
            if
            :: ok && dead[k] -> count_as_acknowledged(k)
            :: else
            fi
        }
        k = 0;
        ok = false;
        check()
    }
}

#define noticed(me) (joined[me] == 0 || joined[me] == epoch)
#define due(me) (wants[me] && lock == NOBODY && !leased_to_others(number))

proctype backend(byte me, number)
{
    byte stamp, v, g, reads = READS;
    bool ok;

    {
end:    do
        :: !noticed(me) -> notice()
        :: atomic { joined[me] == 0 && up -> joined[me] = epoch }
        :: due(me) -> change()
        :: reads > 0 -> reads--; read()
        od
    } unless { d_step { dead[me] -> stamp = 0; v = 0; g = 0; reads = 0; ok = false; wants[me] = false } }
}

/* What the journal announces is bumped, then all its locks go; the journal last, as this daemon may die here, too. */
inline reap(i)
{
#ifdef RELEASE_BEFORE_BUMP
    release(i);
#endif
#ifndef NO_JOURNAL
    if
    :: journal[i] -> bump()
    :: else
    fi;
#endif
#ifndef NO_RELEASE
    release(i);
#endif
    atomic {
        journal[i] = false;
        reaped[i] = true;
        count_as_acknowledged(i);
        check();
#ifdef NEWCOMER
        if
        :: i == 0 ->
            dead[2] = false;
            joined[2] = epoch;
            wants[2] = true;
#ifdef HOLDER_REUSED
            run backend(2, 0)
#else
            run backend(2, 2)
#endif
        :: else
        fi
#endif
    }
}

inline release(i)
{
    d_step {
        if
        :: lock == i -> lock = NOBODY
        :: else
        fi
    }
}

/* What an earlier daemon left: reap the dead, await the living. */
inline recover()
{
    floor = DISTRUST;
    for (i : 0 .. N - 1) {
        if
        :: dead[i] && !reaped[i] -> reap(i)
        :: joined[i] == epoch || reaped[i]
#ifdef FLOOR_BEFORE_ALL_ARE_BACK
        :: !dead[i]
#endif
        fi
    }
    i = 0;
    atomic { sequence++; g = sequence };
    d_step { floor = g; g = 0 }
}

#define must_reap(i) (dead[i] && !reaped[i] && joined[i] == epoch)

proctype daemon()
{
    byte g, i;

begin:
    {
        if
        :: epoch > 1 -> recover()
        :: else
        fi;
end:    do
        :: must_reap(0) -> reap(0)
        :: must_reap(1) -> reap(1)
        od
    } unless { !up }
    d_step { g = 0; i = 0 };
end_restart:
    up = true;
    goto begin
}

proctype fate()
{
    byte backend_deaths = BACKEND_DEATHS, daemon_deaths = DAEMON_DEATHS;

    do
    :: d_step { backend_deaths > 0 && !dead[0] -> dead[0] = true; backend_deaths-- }
    :: d_step { backend_deaths > 0 && !dead[1] -> dead[1] = true; backend_deaths-- }
    :: d_step { daemon_deaths > 0 && up -> up = false; epoch++; daemon_deaths-- }
    :: break
    od
}

proctype clock()
{
end:
    do
    :: d_step { lease[0] && (!giving[0] || dead[0]) -> lease[0] = false; keeps[0] = false; copy[0] = 0 }
    :: d_step { lease[1] && (!giving[1] || dead[1]) -> lease[1] = false; keeps[1] = false; copy[1] = 0 }
    /* A dead backend's lock runs out, where no daemon takes it away before: so late that this has been noticed. */
    :: d_step { lock != NOBODY && dead[lock] && !up && floor == DISTRUST -> lock = NOBODY }
    od
}

/* The aware guest. In the end it can have no old copy, even where nobody was told of the change. */
proctype guest()
{
    byte mine, stamp, needed;

    stamp = sequence;
    mine = host;
    if
    :: needed = acked
    :: timeout -> needed = (up || !dead[0] || !dead[1] -> host : acked)
    fi;
    if
    :: slot <= stamp ->
        if
        :: floor <= stamp -> assert(mine >= needed)
        :: else
        fi
    :: else
    fi
}

init
{
    atomic {
        joined[0] = 1;
        joined[1] = 1;
        wants[0] = true;
        wants[1] = CHANGERS == 2;
#ifdef NEWCOMER
        dead[2] = true;
        reaped[2] = true;
#endif
        run backend(0, 0);
        run backend(1, 1);
        run daemon();
        run fate();
        run clock();
#if !defined(STOCK) && !defined(LIVENESS)
        run guest()
#endif
    }
}

#ifdef LIVENESS
ltl change_is_made { [] (wants[1] -> <> (!wants[1] || dead[1])) }
#endif
