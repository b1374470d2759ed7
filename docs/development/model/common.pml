/*
 * What the models share: the words of the version table for one thing, and what the world knows.
 *
 * One thing (a file, a name) is followed. Its content is a version number, which each change raises by one.
 */
#define MAX(a, b) ((a) > (b) -> (a) : (b))

byte host;          /* the version that the host has */
byte sequence = 1;
byte slot;
byte acked;         /* the newest version whose change was acknowledged */

/* vt_bump(): two atomic operations, in between which anything may happen. The variable g is the caller's. */
inline bump()
{
    atomic { sequence++; g = sequence }
#ifdef BUMP_STORES
    d_step { slot = g; g = 0 }
#else
    d_step { slot = MAX(slot, g); g = 0 }
#endif
}
