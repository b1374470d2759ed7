/* Changes: one system call each, where that can be. */
#include "actor.h"

#include <sys/xattr.h>

void fill(char *buffer, uint32_t length, int64_t value)
{
	char digits[9];
	snprintf(digits, sizeof(digits), "%08x", (unsigned)value);
	for (uint32_t i = 0; i < length; i++)
		buffer[i] = digits[i % 8];
}

static int write_to(int fd, const struct action *action)
{
	static _Thread_local char data[LONGEST_FILE];
	uint32_t length = action->length < sizeof(data) ? action->length : sizeof(data);
	fill(data, length, action->value);
	if (fd < 0)
		return -1;
	ssize_t done = action->flags & O_APPEND ? write(fd, data, length) : pwrite(fd, data, length, action->offset);
	if (done >= 0 && done != length) {
		errno = ENOSPC;
		return -1;
	}
	return done < 0 ? -1 : 0;
}

static int write_and_close(int fd, const struct action *action)
{
	int failed = write_to(fd, action), error = errno;
	if (fd >= 0 && close(fd) && !failed)
		return -1;
	errno = error;
	return failed;
}

static int hold(int *held, const char *path)
{
	if (*held >= 0)
		close(*held);
	*held = *path ? open(path, O_RDWR) : -1;
	return *path && *held < 0 ? -1 : 0;
}

static int perform(struct context *context, const struct action *action, const char *path, const char *other)
{
	int *held = &context->held[action->slot % HELD_FILES];
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT },
				     { action->value / 1000000000, action->value % 1000000000 } };
	char digits[8];
	switch (action->kind) {
	case CREATE:
		return write_and_close(open(path, O_WRONLY | O_CREAT | O_EXCL, 0644), action);
	case WRITE:
		return write_and_close(open(path, O_WRONLY | action->flags), action);
	case WRITE_HELD:
		return write_to(*held, action);
	case TRUNCATE:
		return truncate(path, action->length);
	case TRUNCATE_HELD:
		return ftruncate(*held, action->length);
	case CHMOD:
		return chmod(path, action->flags);
	case CHOWN:
		return lchown(path, action->value >> 16, action->value & 0xffff);
	case TOUCH:
		return utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW);
	case SET_XATTR:
		fill(digits, sizeof(digits), action->value);
		return setxattr(path, "user.torture", digits, sizeof(digits), 0);
	case RENAME:
		return renameat2(AT_FDCWD, path, AT_FDCWD, other, action->flags);
	case LINK:
		return link(path, other);
	case SYMLINK:
		return symlink(other, path);
	case UNLINK:
		return unlink(path);
	case MKDIR:
		return mkdir(path, 0755);
	case RMDIR:
		return rmdir(path);
	case HOLD:
		return hold(held, path);
	}
	errno = ENOSYS;
	return -1;
}

void change(struct context *context, const struct action *action, const char *path, const char *other,
	    struct result *result)
{
	result->error = perform(context, action, path, other) ? errno : 0;
}
