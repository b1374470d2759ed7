#include "side_channel.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static const uint64_t PATIENCE = 60 * 1000000; /* microseconds */

struct side_channel *side_channel_map(const char *path, unsigned long bytes)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED) {
		perror(path);
		exit(1);
	}
	close(fd);
	return memory;
}

uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000ull + time.tv_nsec / 1000;
}

void back_off(uint64_t moment)
{
	uint64_t time = now();
	uint64_t pause = time < moment ? (moment - time) / 2 : (time - moment) / 8;
	if (pause < 20)
		sched_yield();
	else
		usleep(time < moment || pause < 4000 ? pause : 4000);
}

bool side_channel_wait(struct side_channel *side, _Atomic uint32_t *word, uint32_t number, uint64_t moment)
{
	uint64_t start = now();
	while (atomic_load(word) < number) {
		if (atomic_load(&side->failed) || now() - start > PATIENCE)
			return false;
		back_off(moment);
	}
	return true;
}
