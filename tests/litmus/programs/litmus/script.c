#define _GNU_SOURCE
#include "script.h"
#include "side_channel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WORDS = 8 };

static void refuse(const char *line, const char *why)
{
	fprintf(stderr, "litmus: %s: %s\n", line, why);
	exit(2);
}

static struct step step_of(const char *line, char **words, int count)
{
	struct step step = { .kind = DO, .reg = -1 };
	if (count >= 2 && strcmp(words[1], "=") == 0) {
		step.reg = words[0][0] == 'r' ? atoi(words[0] + 1) : -1;
		if (step.reg < 0 || step.reg >= SLOWEST_CHANGE)
			refuse(line, "no such register");
		words += 2;
		count -= 2;
	}
	if (count == 1 && strcmp(words[0], "tell") == 0) {
		step.kind = TELL;
	} else if (count == 2 && strcmp(words[0], "await") == 0) {
		step.kind = AWAIT;
		step.number = atoi(words[1]) - 1;
		if (step.number < 0 || step.number >= MAX_PARTIES)
			refuse(line, "no such party");
	} else {
		if (count >= 3 && strcmp(words[0], "until") == 0) {
			step.kind = UNTIL;
			step.number = atoi(words[1]);
			words += 2;
			count -= 2;
		}
		step.operation = count ? operation_find(words[0], count - 1, &step.timed) : NULL;
		if (!step.operation)
			refuse(line, "no such operation");
		for (int i = 1; i < count; i++)
			step.arguments[i - 1] = strdup(words[i]);
	}
	return step;
}

static void add(struct step *steps, int *count, const char *line, char **words, int words_count)
{
	if (*count == MAX_STEPS)
		refuse(line, "too many steps");
	steps[(*count)++] = step_of(line, words, words_count);
}

struct test *script_read(void)
{
	struct test *first = NULL, **last = &first, *test = NULL;
	char *line = NULL, *rest;
	size_t size = 0;
	while (getline(&line, &size, stdin) > 0) {
		line[strcspn(line, "\n")] = 0;
		char copy[strlen(line) + 1], *words[MAX_WORDS];
		int count = 0;
		strcpy(copy, line);
		for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
			if (count == MAX_WORDS)
				refuse(line, "too many words");
			words[count++] = word;
		}
		if (count == 5 && strcmp(words[0], "test") == 0) {
			test = calloc(1, sizeof(*test));
			*test = (struct test){ .name = strdup(words[1]),
					       .first = atoi(words[2]),
					       .rounds = atoi(words[3]),
					       .parties = atoi(words[4]) };
			if (test->parties < 1 || test->parties > MAX_PARTIES)
				refuse(line, "so many parties cannot be");
			*last = test;
			last = &test->next;
		} else if (test && count && strcmp(words[0], "warm") == 0) {
			add(test->warm, &test->warm_steps, line, words + 1, count - 1);
		} else if (test && count && strcmp(words[0], "do") == 0) {
			add(test->step, &test->steps, line, words + 1, count - 1);
		} else {
			refuse(line, "neither test, warm nor do");
		}
	}
	free(line);
	return first;
}
