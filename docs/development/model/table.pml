/*
 * The version table (docs/table.md): one slot, two backends that change the same thing, two aware guests.
 *
 * A guest fetches and uses for ever. What it uses it checks with the two loads of vt_valid().
 */
#include "common.pml"

byte floor = 1;

proctype changer()
{
    byte v, g, changes = 2;

    do
    :: changes > 0 ->
        changes--;
#ifdef BUMP_BEFORE_THE_CALL
        bump();
#endif
        /* The system call. */
        d_step { host++; v = host };
#ifdef BUMP_AFTER_THE_REPLY
        acked = MAX(acked, v);
        bump();
#else
#ifndef BUMP_BEFORE_THE_CALL
        bump();
#endif
        acked = MAX(acked, v);
#endif
        v = 0
    :: changes == 0 -> break
    od
}

proctype guest()
{
    byte copy, stamp, needed;

end:
    do
    ::  /* Fetch. A stamp of 0 is never good: nothing is kept while a new copy is under way. */
#ifdef STAMP_AFTER_THE_REPLY
        stamp = 0;
        copy = host;
        stamp = sequence
#else
        d_step { copy = 0; stamp = sequence };
        copy = host
#endif
    ::  /* Use: of what was acknowledged before it began nothing may be missing. */
        stamp != 0 ->
        needed = acked;
        if
        :: slot <= stamp ->
            if
            :: floor <= stamp -> assert(copy >= needed)
            :: else
            fi
        :: else
        fi;
        needed = 0
    od
}

init { atomic { run changer(); run changer(); run guest(); run guest() } }
