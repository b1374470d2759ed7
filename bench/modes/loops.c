/* Runs in a guest: repeats one operation on files of a directory and tells what it took.
 *
 * Usage: loops OPERATION MOUNT FOLDER FILES SECONDS. MOUNT/FOLDER has files f00000 and so on, for `hold` and `change`
 * folders d00000 and so on with a file f in each, so that changes do not wait for each other in the guest.
 *
 * Most operations go over the files again and again for SECONDS and print: operations made, and nanoseconds for one
 * operation: the mean of all, the median and the least of the batches. A batch is one or several passes over the
 * files, as reading the clock costs much in User-Mode Linux. The mean has in it what happens only now and then.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BATCH = 200, MOST_BATCHES = 1 << 20, THREADS = 8, LENGTH = 64 };

static char block[BLOCK] __attribute__((aligned(BLOCK)));
static const char *folder;
static long files;
static int file;              /* the first, open for writing */
static char fresh[LENGTH];    /* a name in the folder that is not there */

static void name_of(char *name, const char *form, long number)
{
	int length = snprintf(name, LENGTH, "%s/", folder);
	snprintf(name + length, LENGTH - length, form, number);
}

static void do_stat(const char *name)
{
	struct stat st;
	if (stat(name, &st))
		err(1, "stat %s", name);
}

static void do_open(const char *name)
{
	int fd = open(name, O_RDONLY);
	if (fd < 0 || close(fd))
		err(1, "open %s", name);
}

static void do_stat_missing(const char *name)
{
	struct stat st;
	if (stat(name, &st) == 0)
		errx(1, "%s is there", name);
}

static void do_write(const char *name)
{
	(void)name;
	if (pwrite(file, block, BLOCK, 0) != BLOCK)
		err(1, "pwrite");
}

static void do_chmod(const char *name)
{
	static int odd;
	if (chmod(name, odd++ & 1 ? 0600 : 0644))
		err(1, "chmod");
}

static void do_create(const char *name)
{
	(void)name;
	int fd = open(fresh, O_CREAT | O_EXCL | O_WRONLY, 0644);
	if (fd < 0 || close(fd) || unlink(fresh))
		err(1, "create");
}

static void do_rename(const char *name)
{
	if (rename(name, fresh) || rename(fresh, name))
		err(1, "rename");
}

static const struct operation {
	const char *name;
	void (*once)(const char *name);
} operations[] = {
	{ "stat", do_stat },
	{ "open", do_open },
	{ "missing", do_stat_missing },
	{ "write", do_write },
	{ "chmod", do_chmod },
	{ "create", do_create },
	{ "rename", do_rename },
};

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static void repeat(const struct operation *operation, double seconds)
{
	static double means[MOST_BATCHES];
	const char *form = operation->once == do_stat_missing ? "missing%05ld" : "f%05ld";
	char (*names)[LENGTH] = calloc(files, sizeof(*names));
	long batches = 0, passes = files < BATCH ? BATCH / files : 1;
	long long start, last, end;

	for (long i = 0; i < files; i++)
		name_of(names[i], form, i);
	for (long i = 0; i < files; i++) /* what is asked for once only does not count */
		operation->once(names[i]);
	start = last = now();
	end = start + (long long)(seconds * 1e9);
	while (last < end && batches < MOST_BATCHES) {
		for (long pass = 0; pass < passes; pass++)
			for (long i = 0; i < files; i++)
				operation->once(names[i]);
		long long t = now();
		means[batches++] = (double)(t - last) / (passes * files);
		last = t;
	}
	long count = batches * passes * files;
	qsort(means, batches, sizeof(*means), by_value);
	printf("%ld %.1f %.1f %.1f\n", count, (double)(last - start) / count, means[batches / 2], means[0]);
}

/* Looks at every file ten times a second, and sleeps in between, so as not to take the processor from others. */
static void hold(double seconds)
{
	char name[LENGTH];
	long long end = now() + (long long)(seconds * 1e9);

	while (now() < end) {
		for (long i = 0; i < files; i++) {
			struct stat st;
			name_of(name, "d%05ld/f", i);
			(void)stat(name, &st); /* renamed or removed by now, perhaps */
		}
		usleep(100000);
	}
}

static long next;

/* One change to each file, by all ways in turn; microseconds of each, a line each. */
static void *change(void *unused)
{
	(void)unused;
	for (long i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < files;) {
		char name[LENGTH], other[LENGTH];
		int failed = 0;
		name_of(name, "d%05ld/f", i);
		name_of(other, "d%05ld/g", i);
		long long start = now();
		switch (i % 4) {
		case 0: failed = chmod(name, 0600); break;
		case 1: failed = truncate(name, 1); break;
		case 2: failed = rename(name, other); break;
		case 3: failed = unlink(name); break;
		}
		if (failed)
			err(1, "%s", name);
		printf("%lld\n", (now() - start) / 1000);
	}
	return NULL;
}

static void change_all(void)
{
	pthread_t threads[THREADS];
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, change, NULL))
			errx(1, "pthread_create");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
	if (argc != 6)
		errx(2, "usage: loops OPERATION MOUNT FOLDER FILES SECONDS");
	if (chdir(argv[2]))
		err(1, "%s", argv[2]);
	folder = argv[3];
	files = atol(argv[4]);
	double seconds = atof(argv[5]);
	name_of(fresh, "fresh", 0);
	if (strcmp(argv[1], "hold") == 0) {
		hold(seconds);
		return 0;
	}
	if (strcmp(argv[1], "change") == 0) {
		change_all();
		return 0;
	}
	char name[LENGTH];
	name_of(name, "f%05ld", 0);
	if (strcmp(argv[1], "write") == 0 && (file = open(name, O_RDWR)) < 0)
		err(1, "%s", name);
	for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
		if (strcmp(argv[1], operations[i].name))
			continue;
		repeat(&operations[i], seconds);
		return 0;
	}
	errx(2, "no operation %s", argv[1]);
}
