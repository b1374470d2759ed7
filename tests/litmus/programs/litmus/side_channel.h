/* Memory that the parties share beside the file system: barriers, "told", results. tests/litmus/side_channel.py
 * has the layout too. All words are 32 bits, naturally aligned; order is that of C11 sequential consistency.
 */
#ifndef SIDE_CHANNEL_H
#define SIDE_CHANNEL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* The last registers: how long the party's slowest look and its slowest change took, in microseconds. */
enum { MAX_PARTIES = 4, MAX_LANES = 256, REGISTERS = 8, SLOWEST_LOOK = REGISTERS - 1, SLOWEST_CHANGE = REGISTERS - 2 };

#define UNSET INT32_MIN

/* One party in one lane; a cache line of its own. */
struct cell {
	_Atomic uint32_t arrived; /* number of the last barrier that it came to */
	_Atomic uint32_t told;	  /* number of the round's barrier at which it told, or ended its program */
	_Atomic uint32_t ended;	  /* the same, at which it ended its program */
	_Atomic uint32_t took;	  /* microseconds that its program took in the round before */
	uint32_t padding[12];
};

struct side_channel {
	_Atomic uint32_t failed; /* a party gave up: the others need not wait */
	uint32_t padding[15];
	struct cell cells[MAX_LANES][MAX_PARTIES];
	_Atomic int32_t results[][MAX_PARTIES][REGISTERS]; /* by round of the whole run */
};

/* Maps the device or file; ends the program where it cannot. */
struct side_channel *side_channel_map(const char *path, unsigned long bytes);

/* Wait until a word is at least `number`, probably at the time `moment`. Returns false after a minute, or when a party
 * failed. */
bool side_channel_wait(struct side_channel *side, _Atomic uint32_t *word, uint32_t number, uint64_t moment);

/* Microseconds of a clock that never goes back. */
uint64_t now(void);

/* Before the next look for something that probably happens at the time `moment`: the farther from it, the more seldom.
 * A guest that spins takes the processor from the others. */
void back_off(uint64_t moment);

#endif
