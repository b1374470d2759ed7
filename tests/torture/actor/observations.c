/* Observations: what this guest believes of a name, a file or a directory, by one of several ways. */
#include "actor.h"

#include <dirent.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/xattr.h>

static uint32_t crc_table[256];

__attribute__((constructor)) static void make_crc_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int bit = 0; bit < 8; bit++)
			c = c & 1 ? 0xedb88320 ^ c >> 1 : c >> 1;
		crc_table[i] = c;
	}
}

/* As zlib's. */
static uint32_t crc32(uint32_t crc, const void *data, size_t size)
{
	crc = ~crc;
	for (const uint8_t *at = data, *end = at + size; at < end; at++)
		crc = crc_table[(crc ^ *at) & 0xff] ^ crc >> 8;
	return ~crc;
}

static int take_status(int failed, const struct stat *status, struct result *result)
{
	if (failed)
		return -1;
	result->mode = status->st_mode;
	result->links = status->st_nlink;
	result->uid = status->st_uid;
	result->gid = status->st_gid;
	result->inode = status->st_ino;
	/* A directory's size is the file system's own affair. */
	result->size = S_ISDIR(status->st_mode) ? 0 : status->st_size;
	result->mtime = status->st_mtim.tv_sec * 1000000000L + status->st_mtim.tv_nsec;
	result->ctime = status->st_ctim.tv_sec * 1000000000L + status->st_ctim.tv_nsec;
	return 0;
}

static int read_through(int fd, struct result *result)
{
	static _Thread_local char data[LONGEST_FILE];
	uint32_t crc = 0;
	ssize_t n;
	for (off_t at = 0; (n = pread(fd, data, sizeof(data), at)) > 0; at += n)
		crc = crc32(crc, data, n);
	result->content = crc;
	return n < 0 ? -1 : 0;
}

static _Thread_local sigjmp_buf beyond_the_end;

static void jump(int signal)
{
	(void)signal;
	siglongjmp(beyond_the_end, 1);
}

/* Through pages of the cache; a size that is too large shows as EFAULT, not as the end of this program. */
static int read_mapping(int fd, struct result *result)
{
	if (S_ISDIR(result->mode)) {
		errno = EISDIR;
		return -1;
	}
	if (result->size == 0)
		return 0;
	void *pages = mmap(NULL, result->size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (pages == MAP_FAILED)
		return -1;
	struct sigaction action = { .sa_handler = jump };
	sigaction(SIGBUS, &action, NULL);
	int failed = sigsetjmp(beyond_the_end, 1);
	if (!failed)
		result->content = crc32(0, pages, result->size);
	munmap(pages, result->size);
	errno = EFAULT;
	return failed ? -1 : 0;
}

static int read_file(const char *path, int (*way)(int, struct result *), struct result *result)
{
	struct stat status;
	int fd = open(path, O_RDONLY | O_NOFOLLOW);
	if (fd < 0)
		return -1;
	int failed = take_status(fstat(fd, &status), &status, result) || way(fd, result), error = errno;
	close(fd);
	errno = error;
	return failed ? -1 : 0;
}

static int read_held(int fd, struct result *result)
{
	struct stat status;
	return take_status(fstat(fd, &status), &status, result) || read_through(fd, result) ? -1 : 0;
}

static int compare_names(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The names in a directory, sorted, each with the digit of its type. */
static int list(const char *path, struct result *result)
{
	enum { MOST = 256 };
	char *names[MOST];
	int count = 0, failed;
	DIR *directory = opendir(path);
	if (!directory)
		return -1;
	errno = 0;
	for (struct dirent *entry; count < MOST && (entry = readdir(directory));) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		if (asprintf(&names[count], "%s/%d", entry->d_name, entry->d_type) < 0)
			abort();
		count++;
	}
	failed = errno;
	closedir(directory);
	qsort(names, count, sizeof(*names), compare_names);
	for (int i = 0; i < count; i++) {
		result->content = crc32(result->content, names[i], strlen(names[i]) + 1);
		free(names[i]);
	}
	result->size = count;
	errno = failed;
	return failed ? -1 : 0;
}

static int take_bytes(ssize_t size, const char *data, struct result *result)
{
	if (size < 0)
		return -1;
	result->size = size;
	result->content = crc32(0, data, size);
	return 0;
}

/* lstat(2) that never believes the cache. */
static int ask(const char *path)
{
	struct statx status;
	return statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &status);
}

static int look(struct context *context, const struct action *action, const char *path, struct result *result)
{
	struct stat status;
	char data[256];
	switch (action->kind & ~WATCH) {
	case LSTAT:
		return take_status(lstat(path, &status), &status, result);
	case OPEN:
		return read_file(path, read_through, result);
	case MAP:
		return read_file(path, read_mapping, result);
	case READ_HELD:
		return read_held(context->held[(action->kind & WATCH ? action->offset : action->slot) % HELD_FILES], result);
	case LIST:
		return list(path, result);
	case READ_LINK:
		return take_bytes(readlink(path, data, sizeof(data)), data, result);
	case GET_XATTR:
		return take_bytes(lgetxattr(path, "user.torture", data, sizeof(data)), data, result);
	case ASK:
		return ask(path);
	}
	errno = ENOSYS;
	return -1;
}

void observe(struct context *context, const struct action *action, const char *path, struct result *result)
{
	if (look(context, action, path, result))
		*result = (struct result){ .error = errno };
}
