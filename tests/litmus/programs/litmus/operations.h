/* The operations that a program of a litmus test is made of (docs/litmus.md lists them). */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include <stdbool.h>
#include <stdint.h>

enum { ARGUMENTS = 2, HANDLES = 4, PATH_BYTES = 512 };

/* Where a party is: in which round's directory, and what it holds open. */
struct place {
	const char *directory;
	int party;
	int handles[HANDLES]; /* -1: closed */
};

/* What it returns: 0 or a value; negative: an errno. */
typedef int32_t (*operation)(struct place *place, const char *const arguments[ARGUMENTS]);

/* The operation of a name with so many arguments; NULL: there is none. `looks`: whether it changes nothing. */
operation operation_find(const char *name, int arguments, bool *looks);

/* A place in a round's directory with nothing open; and its end. */
void place_enter(struct place *place, const char *directory, int party);
void place_leave(struct place *place);

#endif
