/* One party of the litmus tests: does its part in every round, and puts what it saw into the side channel.
 *
 * Usage: litmus SIDE_CHANNEL BYTES ROOT PARTY PARTIES LANES SETTLE_MS SEED < SCRIPT
 *
 * Lanes are threads; lane L does rounds L, L + LANES, ... of the whole run, together with lane L of the other parties,
 * so that a lane that waits holds nobody up. Exit status: 0 all rounds done, 1 a party failed, 2 wrong usage.
 */
#define _GNU_SOURCE
#include "script.h"
#include "side_channel.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct side_channel *side;
static const char *root;
static int party, parties, lanes;
static uint64_t settle; /* microseconds */
static uint64_t seed;
static const struct test *tests;

/* splitmix64 */
static uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

/* Half of the time none, else 1 microsecond to 2 ms, each power of two as likely as the other. */
static void random_delay(uint64_t *state)
{
	uint64_t number = draw(state);
	if (number & 1)
		return;
	uint64_t length = 1u << (number >> 1) % 11, start = now();
	length += draw(state) % length;
	if (length > 50)
		usleep(length);
	while (now() - start < length)
		;
}

/* A round of a test in a lane; `barrier` is the number of its first barrier. */
struct round {
	const struct test *test;
	int number, lane;
	uint32_t barrier;
};

static void await(const struct round *round, _Atomic uint32_t *word, uint32_t number, int other)
{
	if (side_channel_wait(side, word, number))
		return;
	/* Of those who wait for each other, the first one says it. */
	if (!atomic_exchange(&side->failed, 1))
		fprintf(stderr, "litmus: party %d did not come on in round %d of %s\n", other + 1, round->number,
			round->test->name);
	exit(1);
}

static void meet(const struct round *round, uint32_t barrier)
{
	struct cell *cells = side->cells[round->lane];
	atomic_store(&cells[party].arrived, barrier);
	for (int other = 0; other < parties; other++)
		await(round, &cells[other].arrived, barrier, other);
}

static bool others_ended(const struct round *round)
{
	int first = party ? 0 : 1, end = party ? party : parties;
	for (int other = first; other < end; other++)
		if (atomic_load(&side->cells[round->lane][other].ended) < round->barrier)
			return false;
	return true;
}

static int32_t perform(struct place *place, const struct step *step, _Atomic int32_t *registers)
{
	uint64_t start = now();
	int32_t outcome = step->operation(place, (const char *const *)step->arguments);
	int32_t took = now() - start;
	if (step->timed && took > atomic_load(&registers[SLOWEST]))
		atomic_store(&registers[SLOWEST], took);
	return outcome;
}

static int32_t until(const struct round *round, struct place *place, const struct step *step, _Atomic int32_t *registers)
{
	uint64_t start = now(), ended = 0;
	for (;;) {
		/* The look that may be the last one begins after all has been done. */
		if (!ended && others_ended(round))
			ended = now();
		bool last = ended && now() - ended >= settle;
		int32_t outcome = perform(place, step, registers);
		if (outcome == step->number || last)
			return outcome;
		back_off(start);
	}
}

/* Returns false when the program ends here. */
static bool do_step(const struct round *round, struct place *place, const struct step *step, _Atomic int32_t *registers)
{
	struct cell *cells = side->cells[round->lane];
	int32_t outcome = 0;
	switch (step->kind) {
	case DO:
		outcome = perform(place, step, registers);
		break;
	case UNTIL:
		outcome = until(round, place, step, registers);
		break;
	case TELL:
		atomic_store(&cells[party].told, round->barrier);
		break;
	case AWAIT:
		await(round, &cells[step->number].told, round->barrier, step->number);
		usleep(settle);
		break;
	}
	if (step->reg >= 0)
		atomic_store(&registers[step->reg], outcome);
	return step->kind != UNTIL || outcome == step->number;
}

static void play(const struct round *round)
{
	const struct test *test = round->test;
	struct cell *cell = &side->cells[round->lane][party];
	char directory[PATH_BYTES];
	struct place place;
	uint64_t state = seed ^ (uint64_t)(test->first + round->number) << 8 ^ party;
	_Atomic int32_t *registers = side->results[test->first + round->number][party];

	snprintf(directory, sizeof(directory), "%s/%s/%05d", root, test->name, round->number);
	place_enter(&place, directory, party + 1);
	for (int i = 0; i < test->warm_steps; i++)
		perform(&place, &test->warm[i], registers);
	meet(round, round->barrier);
	for (int i = 0; i < test->steps; i++) {
		random_delay(&state);
		if (!do_step(round, &place, &test->step[i], registers))
			break;
	}
	atomic_store(&cell->told, round->barrier);
	atomic_store(&cell->ended, round->barrier);
	place_leave(&place);
	meet(round, round->barrier + 1);
}

static void *run_lane(void *argument)
{
	struct round round = { .lane = (intptr_t)argument, .barrier = 1 };
	for (round.test = tests; round.test; round.test = round.test->next)
		for (round.number = 0; round.number < round.test->rounds; round.number++) {
			if ((round.test->first + round.number) % lanes != round.lane)
				continue;
			play(&round);
			round.barrier += 2;
		}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 9) {
		fprintf(stderr,
			"usage: litmus SIDE_CHANNEL BYTES ROOT PARTY PARTIES LANES SETTLE_MS SEED < SCRIPT\n");
		return 2;
	}
	root = argv[3];
	party = atoi(argv[4]) - 1;
	parties = atoi(argv[5]);
	lanes = atoi(argv[6]);
	settle = atoi(argv[7]) * 1000ull;
	seed = strtoull(argv[8], NULL, 10);
	if (party < 0 || party >= parties || parties > MAX_PARTIES || lanes < 1 || lanes > MAX_LANES) {
		fprintf(stderr, "litmus: at most %d parties and %d lanes, numbered from 1\n", MAX_PARTIES, MAX_LANES);
		return 2;
	}
	side = side_channel_map(argv[1], strtoul(argv[2], NULL, 10));
	tests = script_read();
	mapping_prepare();
	pthread_t threads[MAX_LANES];
	for (int lane = 0; lane < lanes; lane++)
		if (pthread_create(&threads[lane], NULL, run_lane, (void *)(intptr_t)lane)) {
			atomic_store(&side->failed, 1);
			fprintf(stderr, "litmus: no more threads\n");
			return 1;
		}
	for (int lane = 0; lane < lanes; lane++)
		pthread_join(threads[lane], NULL);
	return 0;
}
