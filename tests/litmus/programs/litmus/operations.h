/* The operations that a program of a litmus test is made of (docs/litmus.md lists them). */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "mapping.h"

#include <stdbool.h>
#include <stdint.h>

enum { ARGUMENTS = 3, HANDLES = 4, PATH_BYTES = 512 };

/* Where a party is: in which round's directory, and what it holds open. */
struct place {
	const char *directory;
	int party;
	int handles[HANDLES]; /* -1: closed */
	word *maps[HANDLES]; /* NULL: none */
};

/* What it returns: 0 or a value; negative: an errno. */
typedef int32_t (*operation)(struct place *place, const char *const arguments[ARGUMENTS]);

/* The operation of a name with so many arguments; NULL: there is none. `timed`: whether its answer may be under a lease,
 * and it never waits for the leases of others. */
operation operation_find(const char *name, int arguments, bool *timed);

/* A place in a round's directory with nothing open; and its end. */
void place_enter(struct place *place, const char *directory, int party);
void place_leave(struct place *place);

#endif
