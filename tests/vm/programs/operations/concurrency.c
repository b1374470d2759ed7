/* Locks, threads, and many files open at once. */
#include "check.h"

#include <pthread.h>
#include <sys/file.h>

static void locks(void)
{
	int fd = make("f", O_RDWR, 0644);
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 10 };
	need(fcntl(fd, F_SETLK, &lock) == 0);
	as_user(0, 0, int other = open("f", O_RDWR); refused(fcntl(other, F_SETLK, &lock), EAGAIN);
		lock.l_start = 10; need(fcntl(other, F_SETLK, &lock) == 0););
	need(flock(fd, LOCK_EX) == 0);
	as_user(0, 0, int other = open("f", O_RDWR); refused(flock(other, LOCK_EX | LOCK_NB), EWOULDBLOCK););
	need(flock(fd, LOCK_UN) == 0);
}

static void *worker(void *argument)
{
	long id = (long)argument;
	char name[64], other[64], content[64];
	for (int i = 0; i < 150; i++) {
		snprintf(name, sizeof(name), "thread-%ld-%d", id, i);
		snprintf(other, sizeof(other), "renamed-%ld-%d", id, i);
		snprintf(content, sizeof(content), "%ld %d", id, i);
		make_file(name, content);
		need(rename(name, other) == 0 && has(other, content));
		struct stat st;
		refused(stat(name, &st), ENOENT);
		int fd = open("shared", O_WRONLY | O_APPEND);
		need(fd >= 0 && write(fd, "0123456789", 10) == 10 && close(fd) == 0);
		need(unlink(other) == 0);
	}
	return NULL;
}

static void two_threads(void)
{
	pthread_t threads[2];
	make_file("shared", "");
	for (long i = 0; i < 2; i++)
		need(pthread_create(&threads[i], NULL, worker, (void *)i) == 0);
	for (int i = 0; i < 2; i++)
		need(pthread_join(threads[i], NULL) == 0);
	need(status_of("shared").st_size == 2 * 150 * 10);
}

static void many_open_files(void)
{
	int fds[500];
	char name[32], c;
	for (int i = 0; i < 500; i++) {
		snprintf(name, sizeof(name), "%d", i);
		fds[i] = make(name, O_RDWR, 0644);
		c = i;
		need(write(fds[i], &c, 1) == 1);
	}
	for (int i = 0; i < 500; i++) {
		need(pread(fds[i], &c, 1, 0) == 1 && c == (char)i);
		need(close(fds[i]) == 0);
	}
}

const struct check concurrency_checks[] = {
	CHECK(locks),
	CHECK(two_threads),
	CHECK(many_open_files),
	{ NULL, NULL },
};
