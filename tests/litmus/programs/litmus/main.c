/* One party of the litmus tests: does its part in every round, and puts what it saw into the side channel.
 *
 * Usage: litmus SIDE_CHANNEL BYTES ROOT PARTY LANES SETTLE_MS SEED < SCRIPT
 *
 * Lanes are threads; lane L does rounds L, L + LANES, ... of the whole run, together with lane L of the other parties,
 * so that a lane that waits holds nobody up. Exit status: 0 all rounds done, 1 a party failed, 2 wrong usage.
 */
#define _GNU_SOURCE
#include "script.h"
#include "side_channel.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct side_channel *side;
static const char *root;
static int party, lanes;
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

/* From 1 to below 2^powers, each power of two as likely as the other. */
static uint64_t some(uint64_t *state, int powers)
{
	uint64_t power = (uint64_t)1 << draw(state) % powers;
	return power + draw(state) % power;
}

/* A round of a test in a lane. */
struct round {
	const struct test *test;
	int number, lane;
	uint32_t barrier; /* number of its first barrier */
	uint64_t moment;  /* when the parties before this one have ended, if they take as long as in the round before */
};

/* Half of the time none; else up to 2 ms, or until up to 131 ms before that moment: who waits for leases makes his change
 * then, and who looked at once would race with nothing. */
static void random_delay(const struct round *round, uint64_t *state)
{
	uint64_t number = draw(state), start = now(), end = start;
	if (number & 1)
		return;
	if (number & 2)
		end = round->moment - some(state, 17);
	if (end <= start)
		end = start + some(state, 11);
	if (end - start > 50)
		usleep(end - start);
	while (now() < end)
		;
}

/* The other parties need not wait. */
static void give_up(const char *what)
{
	fprintf(stderr, "litmus: %s: %s\n", what, strerror(errno));
	atomic_store(&side->failed, 1);
	exit(1);
}

static void await(const struct round *round, _Atomic uint32_t *word, uint32_t number, int other)
{
	if (side_channel_wait(side, word, number, round->moment))
		return;
	/* Said before others know of it, as one of them may end us all. */
	if (!atomic_load(&side->failed))
		fprintf(stderr, "litmus: party %d did not come on in round %d of %s\n", other + 1, round->number,
			round->test->name);
	atomic_store(&side->failed, 1);
	exit(1);
}

static void meet(const struct round *round, uint32_t barrier)
{
	struct cell *cells = side->cells[round->lane];
	atomic_store(&cells[party].arrived, barrier);
	for (int other = 0; other < round->test->parties; other++)
		await(round, &cells[other].arrived, barrier, other);
}

static bool others_ended(const struct round *round)
{
	int first = party ? 0 : 1, end = party ? party : round->test->parties;
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
	_Atomic int32_t *slowest = &registers[step->timed ? SLOWEST_LOOK : SLOWEST_CHANGE];
	if (took > atomic_load(slowest))
		atomic_store(slowest, took);
	return outcome;
}

static int32_t until(const struct round *round, struct place *place, const struct step *step, _Atomic int32_t *registers)
{
	uint64_t ended = 0;
	for (;;) {
		/* The look that may be the last one begins after all has been done. */
		if (!ended && others_ended(round))
			ended = now();
		bool last = ended && now() - ended >= settle;
		int32_t outcome = perform(place, step, registers);
		if (outcome == step->number || last)
			return outcome;
		back_off(round->moment);
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

static uint64_t took_before(const struct round *round)
{
	uint64_t longest = 0;
	for (int other = 0; other < party; other++) {
		uint64_t took = atomic_load(&side->cells[round->lane][other].took);
		if (took > longest)
			longest = took;
	}
	return longest;
}

static void play(struct round *round)
{
	const struct test *test = round->test;
	struct cell *cell = &side->cells[round->lane][party];
	char directory[512];
	struct place place;
	uint64_t state = seed ^ (uint64_t)(test->first + round->number) << 8 ^ party;
	_Atomic int32_t *registers = side->results[test->first + round->number][party];

	snprintf(directory, sizeof(directory), "%s/%s/%05d", root, test->name, round->number);
	if (!place_enter(&place, directory, party + 1))
		give_up(directory);
	for (int i = 0; i < test->warm_steps; i++)
		perform(&place, &test->warm[i], registers);
	uint64_t took = took_before(round);
	round->moment = now();
	meet(round, round->barrier);
	uint64_t began = now();
	round->moment = began + took;
	for (int i = 0; i < test->steps; i++) {
		random_delay(round, &state);
		if (!do_step(round, &place, &test->step[i], registers))
			break;
	}
	atomic_store(&cell->took, now() - began);
	atomic_store(&cell->told, round->barrier);
	atomic_store(&cell->ended, round->barrier);
	place_leave(&place);
	meet(round, round->barrier + 1);
}

static void *run_lane(void *argument)
{
	struct round round = { .lane = (intptr_t)argument, .barrier = 1 };
	/* A working directory of its own. */
	if (unshare(CLONE_FS) < 0)
		give_up("unshare");
	for (round.test = tests; round.test; round.test = round.test->next)
		for (round.number = 0; round.number < round.test->rounds; round.number++) {
			if ((round.test->first + round.number) % lanes != round.lane)
				continue;
			if (party < round.test->parties)
				play(&round);
			round.barrier += 2;
		}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 8) {
		fprintf(stderr,
			"usage: litmus SIDE_CHANNEL BYTES ROOT PARTY LANES SETTLE_MS SEED < SCRIPT\n");
		return 2;
	}
	root = argv[3];
	party = atoi(argv[4]) - 1;
	lanes = atoi(argv[5]);
	settle = atoi(argv[6]) * 1000ull;
	seed = strtoull(argv[7], NULL, 10);
	if (party < 0 || party >= MAX_PARTIES || lanes < 1 || lanes > MAX_LANES) {
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
