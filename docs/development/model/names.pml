/*
 * A change of a name is one of the inode behind it, too, and which that is must be found out: two backends change
 * one name, a third has leases on the two inodes that take turns behind it (docs/leases.md, step 1).
 *
 * That a lease is given only on what is so now, and never while the bucket is locked or closed, is leases.pml's
 * to show; here that is one step.
 */
#define NAME 2
#define NOBODY 255

byte name;              /* the inode behind it */
byte links[2];          /* of each inode: a number that each change of it raises */
byte name_slot;         /* raised by the bump of the name */
byte lock[3] = NOBODY;  /* of the buckets of the two inodes and of the name */
bool closed[2];
bool lease[2];          /* of the third backend, whose guest keeps the number of links */
byte copy[2];

hidden byte k;

inline try_lock(thing)
{
    atomic {
        if
        :: lock[thing] == NOBODY -> lock[thing] = me
        :: else -> refused = true
        fi
    }
}

inline let_go()
{
    d_step {
        for (k : 0 .. 2) {
            if
            :: lock[k] == me -> lock[k] = NOBODY
            :: else
            fi
        }
        k = 0
    }
}

/* What it does to the name and its inode: whatever a rename over it, an unlink, a link do. */
proctype changer(byte me)
{
    byte victim, before;
    bool refused;

again:
    before = name_slot;
    victim = name;
    try_lock(NAME);
    if
    :: !refused -> try_lock(victim)
    :: else
    fi;
#ifndef VICTIM_OF_BEFORE_THE_LOCK
    refused = refused || name_slot != before;
#endif
    if
    :: refused -> let_go(); refused = false; goto again
    :: else
    fi;
    if
    :: lease[victim] -> closed[victim] = true; let_go(); !lease[victim]; goto again
    :: else
    fi;
    /* The system call. It takes what is behind the name now; nobody may keep that. */
    d_step {
        assert(!lease[name]);
        links[name]++;
        name = 1 - name
    };
    name_slot++;
    let_go();
    d_step { victim = 0; before = 0 }
}


proctype reader()
{
end:
    do
    :: d_step { lock[0] == NOBODY && !closed[0] && !lease[0] -> lease[0] = true; copy[0] = links[0] }
    :: d_step { lock[1] == NOBODY && !closed[1] && !lease[1] -> lease[1] = true; copy[1] = links[1] }
    :: d_step { lease[0] -> lease[0] = false; copy[0] = 0 }
    :: d_step { lease[1] -> lease[1] = false; copy[1] = 0 }
    od
}

init { atomic { run changer(0); run changer(1); run reader() } }
