#include "check.h"

#include <grp.h>
#include <stdarg.h>

const char *check_name;

void say(const char *verdict, const char *format, ...)
{
	int error = errno;
	va_list arguments;
	va_start(arguments, format);
	printf("%s %s: ", verdict, check_name);
	vprintf(format, arguments);
	printf(" (errno: %s)\n", strerror(error));
	va_end(arguments);
	fflush(stdout);
}

int make(const char *name, int flags, mode_t mode)
{
	int fd = open(name, flags | O_CREAT, mode);
	need(fd >= 0);
	return fd;
}

void make_file(const char *name, const char *content)
{
	int fd = make(name, O_WRONLY | O_TRUNC, 0644);
	need(write(fd, content, strlen(content)) == (ssize_t)strlen(content));
	need(close(fd) == 0);
}

int has(const char *name, const char *content)
{
	char buffer[8192];
	int fd = open(name, O_RDONLY);
	if (fd < 0)
		return 0;
	ssize_t size = read(fd, buffer, sizeof(buffer));
	close(fd);
	return size == (ssize_t)strlen(content) && memcmp(buffer, content, size) == 0;
}

struct stat status_of(const char *name)
{
	struct stat st;
	need(lstat(name, &st) == 0);
	return st;
}

void become(uid_t uid, gid_t gid)
{
	need(setgroups(0, NULL) == 0);
	need(setresgid(gid, gid, gid) == 0);
	need(setresuid(uid, uid, uid) == 0);
}
