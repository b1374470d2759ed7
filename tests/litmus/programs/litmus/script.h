/* What a party has to do, as it comes on standard input:
 *
 *     test NAME FIRST ROUNDS PARTIES    a test, the number of its first round in the whole run, how many, of how many
 *     warm OPERATION            before the round begins
 *     do STEP                   in the round
 *
 * OPERATION: name and arguments (operations.c). STEP: one of
 *
 *     OPERATION                 not recorded
 *     rN = OPERATION            its result goes to register N
 *     rN = until V OPERATION    again and again until the result is V; when it is not, though all parties before this
 *                               one (before party 1: those after it) had ended their programs, and SETTLE_MS was
 *                               over, this program ends here
 *     tell                      say over the side channel that all steps so far are done
 *     await P                   wait until party P told, or ended its program, and for SETTLE_MS
 */
#ifndef SCRIPT_H
#define SCRIPT_H

#include "operations.h"

#include <stdbool.h>

enum { MAX_STEPS = 32 };

enum kind { DO, UNTIL, TELL, AWAIT };

struct step {
	enum kind kind;
	int reg;    /* -1: not recorded */
	int number; /* UNTIL: the value; AWAIT: the party */
	operation operation;
	bool timed; /* it changes nothing, and never waits for the leases of others */
	char *arguments[ARGUMENTS];
};

struct test {
	char *name;
	int first, rounds, parties;
	int warm_steps, steps;
	struct step warm[MAX_STEPS], step[MAX_STEPS];
	struct test *next;
};

/* Reads standard input; ends the program with a message when it makes no sense. */
struct test *script_read(void);

#endif
