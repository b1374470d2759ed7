/* The operations that a program of a litmus test is made of (docs/development/litmus.md lists them). */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "mapping.h"

#include <stdbool.h>
#include <stdint.h>

enum { ARGUMENTS = 3, HANDLES = 4, NAME_BYTES = 64 };

/* A party in a round's directory, which is the working directory of its thread: names are looked up there, and not along a
 * whole path, which takes most of the time where guests keep nothing. */
struct place {
	int party;
	int handles[HANDLES]; /* -1: closed */
	word *maps[HANDLES]; /* NULL: none */
};

/* What it returns: 0 or a value; negative: an errno. */
typedef int32_t (*operation)(struct place *place, const char *const arguments[ARGUMENTS]);

/* The operation of a name with so many arguments; NULL: there is none. `timed`: whether its answer may be under a lease,
 * and it never waits for the leases of others. */
operation operation_find(const char *name, int arguments, bool *timed);

/* Go to a round's directory, with nothing open; false, and errno: it is not there. Then away from it. */
bool place_enter(struct place *place, const char *directory, int party);
void place_leave(struct place *place);

#endif
