/* Runs in a guest: repeats one operation on a file and tells what it took.
 *
 * Usage: io OPERATION ORDER BLOCK SECONDS FILE. OPERATION is read or write (pread(2), pwrite(2)), load or store (the
 * same by a shared mapping); ORDER is seq or random; BLOCK is in bytes. Goes over the file once (SECONDS is 0), or for
 * SECONDS after it has read a byte of each chunk, so that it has them all mapped. Prints how many blocks, and
 * nanoseconds for one.
 *
 *        io touch - CHUNK 0 FILE: loads a byte of each chunk (of CHUNK bytes), and prints the nanoseconds of each.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 2 << 20 };

static char *block, *mapped;
static long length;
static int file;

static void do_read(off_t offset)
{
	if (pread(file, block, length, offset) != length)
		err(1, "pread");
}

static void do_write(off_t offset)
{
	if (pwrite(file, block, length, offset) != length)
		err(1, "pwrite");
}

static void do_load(off_t offset)
{
	memcpy(block, mapped + offset, length);
}

static void do_store(off_t offset)
{
	memcpy(mapped + offset, block, length);
}

static const struct operation {
	const char *name;
	void (*once)(off_t offset);
} operations[] = {
	{ "read", do_read },
	{ "write", do_write },
	{ "load", do_load },
	{ "store", do_store },
};

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long below(long limit)
{
	static unsigned long state = 1;
	state = state * 6364136223846793005UL + 1442695040888963407UL;
	return (long)((state >> 33) % (unsigned long)limit);
}

static void meet_chunks(off_t size)
{
	char byte;
	for (off_t offset = 0; offset < size; offset += CHUNK)
		if (pread(file, &byte, 1, offset) != 1)
			err(1, "pread");
}

static void repeat(const struct operation *operation, int random, long blocks, double seconds)
{
	/* Reading the clock costs something, too. */
	long count = 0, batch = seconds == 0 ? blocks : length < 65536 ? 256 : 8;
	long long start = now(), last = start, end = start + (long long)(seconds * 1e9);

	do {
		for (long i = 0; i < batch; i++, count++)
			operation->once((random ? below(blocks) : count % blocks) * length);
		last = now();
	} while (last < end);
	printf("%ld %.1f\n", count, (double)(last - start) / count);
}

static void touch(off_t size)
{
	for (off_t offset = 0; offset < size; offset += length) {
		long long start = now();
		(void)*(volatile char *)(mapped + offset);
		printf("%lld\n", now() - start);
	}
}

int main(int argc, char **argv)
{
	struct stat st;

	if (argc != 6)
		errx(2, "usage: io OPERATION ORDER BLOCK SECONDS FILE");
	length = atol(argv[3]);
	block = aligned_alloc(4096, length < 4096 ? 4096 : length);
	memset(block, 'x', length);
	file = open(argv[5], O_RDWR);
	if (file < 0 || fstat(file, &st))
		err(1, "%s", argv[5]);
	if (strcmp(argv[1], "read") && strcmp(argv[1], "write")) {
		mapped = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		if (mapped == MAP_FAILED)
			err(1, "mmap");
	}
	if (strcmp(argv[1], "touch") == 0) {
		touch(st.st_size);
		return 0;
	}
	for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
		if (strcmp(argv[1], operations[i].name))
			continue;
		if (atof(argv[4]) > 0)
			meet_chunks(st.st_size);
		repeat(&operations[i], strcmp(argv[2], "random") == 0, st.st_size / length, atof(argv[4]));
		return 0;
	}
	errx(2, "no operation %s", argv[1]);
}
