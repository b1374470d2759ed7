#define _GNU_SOURCE
#include "operations.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Files are made with this modification time, in seconds (tests/litmus/places.py). */
#define OLD_MTIME 1000000000

enum { CONTENT_BYTES = 64 };

static int32_t result(int status)
{
	return status < 0 ? -errno : 0;
}

static int32_t status_of(const char *name, struct stat *status)
{
	return result(stat(name, status));
}

static int32_t number_in(const char *content, ssize_t length)
{
	if (length < 0)
		return -errno;
	if (length == 0)
		return -ENODATA;
	int32_t number = 0;
	for (ssize_t i = 0; i < length; i++) {
		if (content[i] < '0' || content[i] > '9')
			return -EILSEQ;
		number = number * 10 + content[i] - '0';
	}
	return number;
}

static int32_t write_file(const char *file, int flags, const char *content)
{
	int fd = open(file, O_WRONLY | O_CLOEXEC | flags, 0644);
	if (fd < 0)
		return -errno;
	ssize_t length = strlen(content);
	int32_t outcome = write(fd, content, length) == length ? 0 : -errno;
	if (close(fd) < 0 && outcome == 0)
		outcome = -errno;
	return outcome;
}

static int32_t read_file(const char *file)
{
	char content[CONTENT_BYTES];
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	int32_t number = number_in(content, read(fd, content, sizeof(content)));
	close(fd);
	return number;
}

static int32_t create_(struct place *, const char *const a[])
{
	return write_file(a[0], O_CREAT | O_EXCL, a[1]);
}

static int32_t write_(struct place *, const char *const a[])
{
	return write_file(a[0], 0, a[1]);
}

static int32_t overwrite_(struct place *, const char *const a[])
{
	return write_file(a[0], O_TRUNC, a[1]);
}

static int32_t append_(struct place *, const char *const a[])
{
	return write_file(a[0], O_APPEND, a[1]);
}

static int32_t replace_(struct place *place, const char *const a[])
{
	char new[NAME_BYTES];
	if (snprintf(new, sizeof(new), "%s.new%d", a[0], place->party) >= (int)sizeof(new))
		return -ENAMETOOLONG;
	int32_t outcome = write_file(new, O_CREAT | O_EXCL, a[1]);
	return outcome ? outcome : result(rename(new, a[0]));
}

static int32_t increased(struct place *place, const char *const a[],
			 int32_t (*change)(struct place *, const char *const[]))
{
	char content[16];
	int32_t number = read_file(a[0]);
	if (number < 0)
		return number;
	snprintf(content, sizeof(content), "%04d", number + 1);
	return change(place, (const char *const[]){ a[0], content });
}

static int32_t increment_(struct place *place, const char *const a[])
{
	return increased(place, a, write_);
}

static int32_t increment_by_replace_(struct place *place, const char *const a[])
{
	return increased(place, a, replace_);
}

static int32_t truncate_(struct place *, const char *const a[])
{
	return result(truncate(a[0], atol(a[1])));
}

static int32_t read_(struct place *, const char *const a[])
{
	return read_file(a[0]);
}

static int32_t open_(struct place *place, const char *const a[])
{
	int handle = atoi(a[0]);
	if (handle < 0 || handle >= HANDLES || place->handles[handle] >= 0)
		return -EBADF;
	place->handles[handle] = open(a[1], O_RDONLY | O_CLOEXEC);
	return result(place->handles[handle]);
}

static int held(const struct place *place, const char *handle)
{
	return place->handles[atoi(handle) % HANDLES];
}

static int32_t pread_(struct place *place, const char *const a[])
{
	char content[CONTENT_BYTES];
	return number_in(content, pread(held(place, a[0]), content, sizeof(content), 0));
}

static int32_t held_size_(struct place *place, const char *const a[])
{
	struct stat status;
	return fstat(held(place, a[0]), &status) ? -errno : (int32_t)status.st_size;
}

static int32_t held_links_(struct place *place, const char *const a[])
{
	struct stat status;
	return fstat(held(place, a[0]), &status) ? -errno : (int32_t)status.st_nlink;
}

static int32_t exists_(struct place *, const char *const a[])
{
	struct stat status;
	int32_t error = status_of(a[0], &status);
	return error == -ENOENT ? 0 : error ? error : 1;
}

static int32_t size_(struct place *, const char *const a[])
{
	struct stat status;
	int32_t error = status_of(a[0], &status);
	return error ? error : (int32_t)status.st_size;
}

static int32_t links_(struct place *, const char *const a[])
{
	struct stat status;
	int32_t error = status_of(a[0], &status);
	return error ? error : (int32_t)status.st_nlink;
}

static int32_t mode_(struct place *, const char *const a[])
{
	struct stat status;
	int32_t error = status_of(a[0], &status);
	int32_t bits = status.st_mode;
	/* 0644 is 644. */
	return error ? error : (bits >> 6 & 7) * 100 + (bits >> 3 & 7) * 10 + (bits & 7);
}

static int32_t modified_(struct place *, const char *const a[])
{
	struct stat status;
	int32_t error = status_of(a[0], &status);
	return error ? error : status.st_mtime != OLD_MTIME;
}

static int32_t chmod_(struct place *, const char *const a[])
{
	return result(chmod(a[0], strtol(a[1], NULL, 8)));
}

static int32_t symlink_(struct place *, const char *const a[])
{
	return result(symlink(a[0], a[1]));
}

static int32_t target_(struct place *, const char *const a[])
{
	char content[CONTENT_BYTES];
	return number_in(content, readlink(a[0], content, sizeof(content)));
}

static int32_t mkdir_(struct place *, const char *const a[])
{
	return result(mkdir(a[0], 0755));
}

static int32_t mkdirs_(struct place *, const char *const a[])
{
	char directory[NAME_BYTES];
	if (snprintf(directory, sizeof(directory), "%s", a[0]) >= (int)sizeof(directory))
		return -ENAMETOOLONG;
	for (char *end = directory;; *end++ = '/') {
		end = strchrnul(end, '/');
		bool last = !*end;
		*end = 0;
		if (mkdir(directory, 0755) && errno != EEXIST)
			return -errno;
		if (last)
			return 0;
	}
}

static int32_t rmdir_(struct place *, const char *const a[])
{
	return result(rmdir(a[0]));
}

static int32_t unlink_(struct place *, const char *const a[])
{
	return result(unlink(a[0]));
}

static int32_t rename_(struct place *, const char *const a[])
{
	return result(rename(a[0], a[1]));
}

static int32_t link_(struct place *, const char *const a[])
{
	return result(link(a[0], a[1]));
}

static int32_t listed_(struct place *, const char *const a[])
{
	DIR *list = opendir(a[0]);
	if (!list)
		return -errno;
	int32_t found = 0;
	for (struct dirent *entry; (errno = 0, entry = readdir(list));)
		found |= strcmp(entry->d_name, a[1]) == 0;
	if (errno)
		found = -errno;
	closedir(list);
	return found;
}

static int32_t age_(struct place *, const char *const a[])
{
	const struct timespec times[] = { { .tv_sec = OLD_MTIME }, { .tv_sec = OLD_MTIME } };
	return result(utimensat(AT_FDCWD, a[0], times, 0));
}

static int32_t store_(struct place *, const char *const a[])
{
	word *words;
	int32_t outcome = mapping_make(a[0], &words);
	if (outcome)
		return outcome;
	outcome = mapping_store(words, 0, atoi(a[1]));
	mapping_remove(words);
	return outcome;
}

static int32_t load_(struct place *, const char *const a[])
{
	word *words;
	int32_t outcome = mapping_make(a[0], &words);
	if (outcome)
		return outcome;
	outcome = mapping_load(words, 0);
	mapping_remove(words);
	return outcome;
}

static int32_t map_(struct place *place, const char *const a[])
{
	int handle = atoi(a[0]);
	if (handle < 0 || handle >= HANDLES || place->maps[handle])
		return -EBADF;
	return mapping_make(a[1], &place->maps[handle]);
}

static int32_t store_held_(struct place *place, const char *const a[])
{
	word *words = place->maps[atoi(a[0]) % HANDLES];
	return words ? mapping_store(words, atoi(a[1]), atoi(a[2])) : -EBADF;
}

static int32_t load_held_(struct place *place, const char *const a[])
{
	word *words = place->maps[atoi(a[0]) % HANDLES];
	return words ? mapping_load(words, atoi(a[1])) : -EBADF;
}

static const struct {
	const char *name;
	int arguments;
	operation operation;
	bool timed;
} operations[] = {
	{ "create", 2, create_, false },
	{ "write", 2, write_, false },
	{ "overwrite", 2, overwrite_, false },
	{ "append", 2, append_, false },
	{ "replace", 2, replace_, false },
	{ "increment", 1, increment_, false },
	{ "increment-by-replace", 1, increment_by_replace_, false },
	{ "truncate", 2, truncate_, false },
	{ "read", 1, read_, true },
	{ "open", 2, open_, true },
	{ "pread", 1, pread_, true },
	{ "held-size", 1, held_size_, true },
	{ "held-links", 1, held_links_, true },
	{ "exists", 1, exists_, true },
	{ "size", 1, size_, true },
	{ "links", 1, links_, true },
	{ "mode", 1, mode_, true },
	{ "modified", 1, modified_, true },
	{ "chmod", 2, chmod_, false },
	{ "symlink", 2, symlink_, false },
	{ "target", 1, target_, true },
	{ "mkdir", 1, mkdir_, false },
	{ "mkdirs", 1, mkdirs_, false },
	{ "rmdir", 1, rmdir_, false },
	{ "unlink", 1, unlink_, false },
	{ "rename", 2, rename_, false },
	{ "link", 2, link_, false },
	{ "listed", 2, listed_, true },
	{ "age", 1, age_, false },
	{ "store", 2, store_, false },
	{ "load", 1, load_, false },
	{ "map", 2, map_, true },
	{ "store-held", 3, store_held_, false },
	{ "load-held", 2, load_held_, false },
};

operation operation_find(const char *name, int arguments, bool *timed)
{
	for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
		if (operations[i].arguments == arguments && strcmp(operations[i].name, name) == 0) {
			*timed = operations[i].timed;
			return operations[i].operation;
		}
	return NULL;
}

bool place_enter(struct place *place, const char *directory, int party)
{
	place->party = party;
	for (int i = 0; i < HANDLES; i++) {
		place->handles[i] = -1;
		place->maps[i] = NULL;
	}
	return chdir(directory) == 0;
}

void place_leave(struct place *place)
{
	for (int i = 0; i < HANDLES; i++) {
		if (place->handles[i] >= 0)
			close(place->handles[i]);
		if (place->maps[i])
			mapping_remove(place->maps[i]);
	}
	if (chdir("/") < 0)
		perror("litmus: /");
}
