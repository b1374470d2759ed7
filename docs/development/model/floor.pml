/*
 * The floor (docs/table.md; vt_lift_floor, vt_raise_floor, vt_distrust in coherence/table.h): two backends lift it
 * after a change whose slots nobody knows, while the daemon ends a distrust, and another one.
 *
 * The guest is that of table.pml, once: a copy that is fetched at any time and used at any time.
 */
#include "common.pml"

#define DISTRUST 255
#define distrusted(floor) ((floor) >= 128)

byte floor = DISTRUST;

#if defined(LIFT_LEAVES_A_DISTRUST)
#define to_lift(old) (!distrusted(old) && old < g)
#define lifted(old) g
#elif defined(LIFT_ENDS_A_DISTRUST)
#define to_lift(old) (distrusted(old) || old < g)
#define lifted(old) g
#else
#define to_lift(old) (distrusted(old) || old < g)
#define lifted(old) (distrusted(old) -> old - 1 : g)
#endif

/* To next. Sets swapped; where it fails, old is what the floor is now. */
inline compare_and_exchange()
{
    atomic {
        swapped = floor == old;
        if
        :: swapped -> floor = next
        :: else -> old = floor
        fi
    }
}

inline lift()
{
    atomic { sequence++; g = sequence };
    old = floor;
    do
    :: !swapped && to_lift(old) -> next = lifted(old); compare_and_exchange()
    :: else -> break
    od;
    atomic { swapped = false; old = 0; next = 0; g = 0 }
}

inline raise()
{
    do
    :: !swapped ->
#ifdef RAISE_TAKES_ITS_NUMBER_FIRST
        atomic { sequence++; g = sequence };
        old = floor;
#else
        old = floor;
        atomic { sequence++; g = sequence };
#endif
        next = g;
        compare_and_exchange()
    :: else -> break
    od;
    atomic { swapped = false; old = 0; next = 0; g = 0 }
}

inline distrust()
{
    old = floor;
    do
    :: !swapped && !distrusted(old) -> next = DISTRUST; compare_and_exchange()
    :: else -> break
    od;
    atomic { swapped = false; old = 0; next = 0 }
}

proctype changer()
{
    byte v, g, old, next;
    bool swapped;

    d_step { host++; v = host };
    lift();
    acked = MAX(acked, v)
}

proctype daemon()
{
    byte v, g, old, next;
    bool swapped;

    raise();
    /* Somebody dies in a change that nobody bumps. */
    d_step { host++; v = host };
    distrust();
    acked = MAX(acked, v);
    raise()
}

proctype guest()
{
    byte copy, stamp;

    stamp = sequence;
    copy = host;
    d_step { assert(floor > stamp || copy >= acked) }
}

init { atomic { run changer(); run changer(); run daemon(); run guest() } }
