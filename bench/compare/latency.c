/* Runs in a guest: repeats one operation on a mounted share and prints the time of one, in nanoseconds.
 *
 * The repetitions are timed in 20 groups, for reading the clock costs much in User-Mode Linux, and the median of
 * the groups' means is printed: what else the host does now and then does not count.
 * Usage: latency OPERATION DIRECTORY COUNT. DIRECTORY has been prepared by `latency prepare DIRECTORY 0`.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BIG = 1 << 20, FILE_SIZE = 64 << 20, ENTRIES = 1000, GROUPS = 20 };

static char *buffer; /* page-aligned: what FUSE then sends depends on nothing else */
static int file;

static void do_stat(long i)
{
	struct stat st;
	(void)i;
	if (stat("b/f", &st))
		err(1, "stat");
}

static void do_open(long i)
{
	(void)i;
	int fd = open("b/f", O_RDONLY);
	if (fd < 0 || close(fd))
		err(1, "open");
}

static void do_pread(long i)
{
	if (pread(file, buffer, BLOCK, i % (FILE_SIZE / BLOCK) * BLOCK) != BLOCK)
		err(1, "pread");
}

static void do_pwrite(long i)
{
	if (pwrite(file, buffer, BLOCK, i % (FILE_SIZE / BLOCK) * BLOCK) != BLOCK)
		err(1, "pwrite");
}

static void do_create(long i)
{
	(void)i;
	int fd = open("b/new", O_CREAT | O_EXCL | O_WRONLY, 0644);
	if (fd < 0 || close(fd) || unlink("b/new"))
		err(1, "create");
}

static void do_list(long i)
{
	(void)i;
	int count = 0;
	DIR *directory = opendir("entries");
	if (!directory)
		err(1, "opendir");
	while (readdir(directory))
		count++;
	closedir(directory);
	if (count != ENTRIES + 2)
		errx(1, "%d entries instead of %d", count, ENTRIES + 2);
}

/* The names and inodes that the guest knows are dropped, and the backend has time for their FORGETs. */
static void drop_names(void)
{
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
	if (fd < 0 || write(fd, "2", 1) != 1)
		err(1, "drop_caches");
	close(fd);
	usleep(20000);
}

/* As find and du do: each stat after its entry makes the kernel go on with READDIRPLUS (fs/fuse/readdir.c). */
static void do_list_stat(long i)
{
	(void)i;
	int count = 0;
	struct stat st;
	struct dirent *entry;
	DIR *directory = opendir("entries");
	if (!directory)
		err(1, "opendir");
	for (; (entry = readdir(directory)); count++)
		if (entry->d_name[0] != '.' && fstatat(dirfd(directory), entry->d_name, &st, AT_SYMLINK_NOFOLLOW))
			err(1, "stat");
	closedir(directory);
	if (count != ENTRIES + 2)
		errx(1, "%d entries instead of %d", count, ENTRIES + 2);
}

static void do_read_big(long i)
{
	if (pread(file, buffer, BIG, i % (FILE_SIZE / BIG) * BIG) != BIG)
		err(1, "pread");
}

static void do_write_big(long i)
{
	if (pwrite(file, buffer, BIG, i % (FILE_SIZE / BIG) * BIG) != BIG)
		err(1, "pwrite");
}

static const struct operation {
	const char *name;
	void (*once)(long i);
	void (*before)(void); /* each repetition, not timed; NULL: nothing */
} operations[] = {
	{ "stat", do_stat, NULL },
	{ "open", do_open, NULL },
	{ "pread", do_pread, NULL },
	{ "pwrite", do_pwrite, NULL },
	{ "create", do_create, NULL },
	{ "list", do_list, NULL },
	{ "list-stat", do_list_stat, drop_names },
	{ "read-big", do_read_big, NULL },
	{ "write-big", do_write_big, NULL },
};

static void prepare(void)
{
	char name[64];
	if (mkdir("b", 0755) || mkdir("entries", 0755))
		err(1, "mkdir");
	int fd = open("b/f", O_CREAT | O_WRONLY, 0644);
	for (long i = 0; i < FILE_SIZE / BIG; i++)
		if (write(fd, buffer, BIG) != BIG)
			err(1, "write");
	close(fd);
	for (int i = 0; i < ENTRIES; i++) {
		snprintf(name, sizeof(name), "entries/entry-%04d.txt", i);
		close(open(name, O_CREAT | O_WRONLY, 0644));
	}
}

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

static double measure(const struct operation *operation, long count)
{
	double means[GROUPS];
	long n = 0;
	for (int group = 0; group < GROUPS; group++) {
		long first = n, end = count * (group + 1) / GROUPS;
		long long spent = 0, start = now();
		while (n < end) {
			if (operation->before) {
				spent += now() - start;
				operation->before();
				start = now();
			}
			operation->once(n++);
		}
		means[group] = (double)(spent + now() - start) / (end - first);
	}
	qsort(means, GROUPS, sizeof(*means), by_value);
	return (means[GROUPS / 2 - 1] + means[GROUPS / 2]) / 2;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		errx(2, "usage: latency OPERATION DIRECTORY COUNT");
	if (posix_memalign((void **)&buffer, BLOCK, BIG) || chdir(argv[2]))
		err(1, "%s", argv[2]);
	memset(buffer, 'x', BIG);
	if (strcmp(argv[1], "prepare") == 0) {
		prepare();
		return 0;
	}
	long count = atol(argv[3]);
	if (count < GROUPS)
		errx(2, "COUNT must be %d or more", GROUPS);
	file = open("b/f", O_RDWR);
	if (file < 0)
		err(1, "b/f");
	for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
		if (strcmp(argv[1], operations[i].name))
			continue;
		printf("%.1f\n", measure(&operations[i], count));
		return 0;
	}
	errx(2, "no operation %s", argv[1]);
}
