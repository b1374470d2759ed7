/*
 * Pages of a file in a stock guest (docs/leases.md; Validity.tell in server/validity.pyx): its kernel drops them when
 * a reply to a GETATTR has another mtime than it knows. A change may leave the mtime as it was; then the data word
 * says that there was one, and the guest is told an mtime that is wrong for a moment (a blip).
 *
 * Another backend changes the file; with HOST, somebody on the host, with no lock and waiting for no lease. How
 * leases are given is leases.pml's; here that is one step.
 */
#include "common.pml"

#define NONE 255
#define BLIP_MAX 3
mtype = { nobody, own, other };

byte mtime;             /* of the file on the host */
byte word;              /* when its data was changed last: the data word */
mtype lock = nobody;
bool lease;             /* of the guest that reads */

/* lt_set_data(): above every stamp of those who cannot have seen it. */
inline set_data()
{
    do
    ::  next = sequence + 1;
        word = MAX(word, next);
#ifdef DATA_WORD_WRITTEN_ONCE
        break
#else
        if
        :: sequence < next -> break
        :: else
        fi
#endif
    od;
    next = 0
}

proctype changer()
{
    byte v, g, next, changes = 2;

    do
    :: changes > 0 ->
        changes--;
#ifndef HOST
        atomic { lock == nobody && !lease -> lock = other };
#endif
        /* The system call: as write(2) does, first the mtime, the same one within a tick of the clock. */
        if
        :: mtime++
        :: skip
        fi;
        d_step { host++; v = host };
        set_data();
        bump();
#ifdef HOST
        /* What was leased before is used until then. */
        !lease;
#else
        lock = nobody;
#endif
        d_step { acked = v; v = 0 }
    :: else -> break
    od
}

/* A change of another thing. */
proctype another()
{
    sequence++
}

#define is_stale (word > told_stamp)

inline spoil()
{
    blip = blip % BLIP_MAX + 1;
    over = false
}

/* The stamp told_by was taken before. */
inline tell()
{
    seen = mtime;
    settled = lock != other;
    stale = is_stale;
    d_step {
        if
        :: told_stamp != 0 && seen == told_mtime && stale -> spoil()
        :: else
        fi;
#ifdef TOLD_ALWAYS_ADVANCES
        settled = true;
#endif
        if
        :: settled || told_stamp == 0 -> told_stamp = told_by
        :: else
        fi;
        told_mtime = seen;
        if
        :: over -> blip = 0; over = false
        :: else
        fi;
        stale = false;
        settled = false;
        seen = 0
    }
}
#define told (told_mtime * (BLIP_MAX + 1) + blip)

inline getattr()
{
    told_by = sequence;
    tell();
    if
    :: told != known -> known = told; pages = NONE
    :: else
    fi;
    /* lt_grant() */
    d_step {
        lease = blip == 0 && lock != other && slot <= told_by;
        told_by = 0
    }
}

/*
 * A chmod, say. Of this reply the kernel takes the mtime, and keeps the pages: so where they may be old, what is told
 * next must be another mtime than this, whenever that is.
 */
inline setattr()
{
    told_by = sequence;
    stale_before = is_stale;
    atomic { lock == nobody -> lock = own };
    bump();
    lock = nobody;
#ifdef STAMP_AFTER_AN_OWN_CHANGE
    told_by = sequence;
#endif
#ifndef SPOILT_ONLY_AFTER_THE_REPLY
    d_step {
        if
        :: stale_before -> spoil()
        :: else
        fi
    };
#endif
    tell();
    known = told;
    d_step {
        if
        :: stale_before -> spoil()
        :: else
        fi;
        stale_before = false;
        told_by = 0
    }
}

proctype guest()
{
    byte pages = NONE, known = NONE, needed, g, setattrs = 1;
    byte told_stamp, told_mtime, told_by, blip, seen;
    bool settled, stale, stale_before, over;

end:
    do
    ::  /* read(2) */
        needed = acked;
        if
        :: lease
        :: !lease -> getattr()
        fi;
        if
        :: pages == NONE -> pages = host
        :: else
        fi;
        assert(pages >= needed);
        needed = 0
    :: setattrs > 0 && !lease && told_stamp != 0 -> setattrs--; setattr()
    :: lease -> lease = false
    :: blip != 0 -> over = true
    od
}

init { atomic { run changer(); run another(); run guest() } }
