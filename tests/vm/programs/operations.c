/* Exercises every operation of a file system by system calls in a guest, and prints one line for each check:
 * "ok NAME", "FAIL NAME: reason" or "skip NAME: reason". Ends with status 1 when any failed.
 *
 * Usage: operations DIRECTORY [CHECK]. DIRECTORY is on the mount to be tested, empty, and we are root.
 * Each check runs in a directory of its own and in a process of its own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { SKIPPED = 77, BLOCK = 4096 };

static const char *check_name;

static void say(const char *verdict, const char *format, ...)
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

/* The condition must hold, or the check has failed. */
#define need(condition)                                               \
	do {                                                          \
		if (!(condition)) {                                   \
			say("FAIL", "line %d: %s", __LINE__, #condition); \
			_exit(1);                                     \
		}                                                     \
	} while (0)

/* The call must fail with this error. */
#define refused(call, error)                                                             \
	do {                                                                             \
		errno = 0;                                                               \
		if ((call) != -1 || errno != (error)) {                                  \
			say("FAIL", "line %d: %s is not refused with %s", __LINE__, #call, #error); \
			_exit(1);                                                        \
		}                                                                        \
	} while (0)

static int make(const char *name, int flags, mode_t mode)
{
	int fd = open(name, flags | O_CREAT, mode);
	need(fd >= 0);
	return fd;
}

static void make_file(const char *name, const char *content)
{
	int fd = make(name, O_WRONLY | O_TRUNC, 0644);
	need(write(fd, content, strlen(content)) == (ssize_t)strlen(content));
	need(close(fd) == 0);
}

static int has(const char *name, const char *content)
{
	char buffer[8192];
	int fd = open(name, O_RDONLY);
	if (fd < 0)
		return 0;
	ssize_t size = read(fd, buffer, sizeof(buffer));
	close(fd);
	return size == (ssize_t)strlen(content) && memcmp(buffer, content, size) == 0;
}

static struct stat status_of(const char *name)
{
	struct stat st;
	need(lstat(name, &st) == 0);
	return st;
}

static void become(uid_t uid, gid_t gid)
{
	need(setgroups(0, NULL) == 0);
	need(setresgid(gid, gid, gid) == 0);
	need(setresuid(uid, uid, uid) == 0);
}

/* Run part of a check as another user. */
#define as_user(uid, gid, ...)                                        \
	do {                                                          \
		pid_t child = fork();                                 \
		if (child == 0) {                                     \
			become(uid, gid);                             \
			__VA_ARGS__;                                  \
			_exit(0);                                     \
		}                                                     \
		int status_;                                          \
		need(waitpid(child, &status_, 0) == child);           \
		if (status_)                                          \
			_exit(1);                                     \
	} while (0)

static void open_flags(void)
{
	refused(open("none", O_RDONLY), ENOENT);
	int fd = make("f", O_WRONLY | O_EXCL, 0600);
	need(write(fd, "hello", 5) == 5);
	refused(read(fd, &fd, 1), EBADF);
	close(fd);
	refused(open("f", O_CREAT | O_EXCL | O_WRONLY, 0600), EEXIST);
	refused(open("f", O_RDONLY | O_DIRECTORY), ENOTDIR);
	refused(open("f/x", O_RDONLY), ENOTDIR);
	refused(open(".", O_WRONLY), EISDIR);
	need((fd = open("f", O_WRONLY | O_APPEND)) >= 0);
	need(write(fd, "+", 1) == 1 && lseek(fd, 0, SEEK_CUR) == 6);
	close(fd);
	need(has("f", "hello+"));
	need((fd = open("f", O_RDWR | O_TRUNC)) >= 0);
	need(status_of("f").st_size == 0);
	close(fd);
	need(symlink("f", "link") == 0);
	refused(open("link", O_RDONLY | O_NOFOLLOW), ELOOP);
	need((fd = open("link", O_PATH | O_NOFOLLOW)) >= 0);
	close(fd);
	need((fd = open("f", O_RDWR | O_SYNC)) >= 0 && write(fd, "s", 1) == 1);
	close(fd);
}

static void append_by_two(void)
{
	int a = make("f", O_WRONLY | O_APPEND, 0644), b = open("f", O_WRONLY | O_APPEND);
	need(b >= 0);
	for (int i = 0; i < 100; i++)
		need(write(i % 2 ? a : b, "0123456789", 10) == 10);
	need(status_of("f").st_size == 1000);
}

static void tmpfile_and_link(void)
{
	int fd = open(".", O_TMPFILE | O_RDWR, 0640);
	char path[64];
	if (fd < 0 && errno == EOPNOTSUPP) {
		say("skip", "O_TMPFILE is not supported");
		_exit(SKIPPED);
	}
	need(fd >= 0);
	need(write(fd, "unnamed", 7) == 7);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	need(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW) == 0);
	need(has("named", "unnamed"));
	need(status_of("named").st_nlink == 1 && (status_of("named").st_mode & 07777) == 0640);
	close(fd);
	need((fd = open(".", O_TMPFILE | O_RDWR | O_EXCL, 0600)) >= 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	refused(linkat(AT_FDCWD, path, AT_FDCWD, "never", AT_SYMLINK_FOLLOW), ENOENT);
}

static void rename_kinds(void)
{
	make_file("a", "a");
	make_file("b", "b");
	refused(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_NOREPLACE), EEXIST);
	need(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_EXCHANGE) == 0);
	need(has("a", "b") && has("b", "a"));
	refused(renameat2(AT_FDCWD, "a", AT_FDCWD, "none", RENAME_EXCHANGE), ENOENT);
	need(renameat2(AT_FDCWD, "a", AT_FDCWD, "c", RENAME_NOREPLACE) == 0);
	need(access("a", F_OK) == -1 && errno == ENOENT && has("c", "b"));
	need(rename("c", "b") == 0 && has("b", "b"));
	need(mkdir("d", 0755) == 0 && mkdir("d/e", 0755) == 0 && mkdir("full", 0755) == 0);
	make_file("full/x", "x");
	refused(rename("d", "full"), ENOTEMPTY);
	refused(rename("d", "b"), ENOTDIR);
	refused(rename("b", "d"), EISDIR);
	refused(rename("d", "d/e/f"), EINVAL);
	need(rename("d", "moved") == 0 && access("moved/e", F_OK) == 0);
	need(renameat2(AT_FDCWD, "moved", AT_FDCWD, "b", RENAME_EXCHANGE) == 0);
	need(S_ISREG(status_of("moved").st_mode) && S_ISDIR(status_of("b").st_mode));
}

static void rename_over_open_file(void)
{
	char buffer[8];
	make_file("old", "old");
	make_file("new", "new");
	int fd = open("old", O_RDWR);
	need(fd >= 0 && rename("new", "old") == 0);
	need(pread(fd, buffer, 8, 0) == 3 && memcmp(buffer, "old", 3) == 0);
	struct stat st;
	need(fstat(fd, &st) == 0 && st.st_nlink == 0 && has("old", "new"));
}

static void unlink_of_open_file(void)
{
	char buffer[8];
	struct stat st;
	make_file("f", "still");
	int fd = open("f", O_RDWR);
	need(fd >= 0 && unlink("f") == 0);
	refused(open("f", O_RDONLY), ENOENT);
	need(pread(fd, buffer, 8, 0) == 5 && memcmp(buffer, "still", 5) == 0);
	need(fstat(fd, &st) == 0 && st.st_nlink == 0 && st.st_size == 5);
	need(ftruncate(fd, 2) == 0 && fchmod(fd, 0600) == 0);
	need(pwrite(fd, "more", 4, 2) == 4 && fstat(fd, &st) == 0 && st.st_size == 6);
}

static void copy_range(void)
{
	static char data[300000], copy[300000];
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = i * 7 + i / 251;
	int in = make("in", O_RDWR, 0644), out = make("out", O_RDWR, 0644);
	need(write(in, data, sizeof(data)) == sizeof(data));
	loff_t from = 100, to = 5000;
	size_t left = 200000;
	while (left) {
		ssize_t n = copy_file_range(in, &from, out, &to, left, 0);
		need(n > 0);
		left -= n;
	}
	need(pread(out, copy, sizeof(copy), 5000) == 200000 && memcmp(copy, data + 100, 200000) == 0);
	need(status_of("out").st_size == 205000);
}

static void allocate_kinds(void)
{
	char buffer[BLOCK * 4];
	struct stat st;
	int fd = make("f", O_RDWR, 0644);
	need(fallocate(fd, 0, 0, BLOCK * 4) == 0);
	need(fstat(fd, &st) == 0 && st.st_size == BLOCK * 4);
	need(fallocate(fd, FALLOC_FL_KEEP_SIZE, BLOCK * 4, BLOCK) == 0);
	need(fstat(fd, &st) == 0 && st.st_size == BLOCK * 4);
	memset(buffer, 'x', sizeof(buffer));
	need(pwrite(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
	need(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, BLOCK, BLOCK) == 0);
	need(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
	need(buffer[BLOCK - 1] == 'x' && buffer[BLOCK] == 0 && buffer[2 * BLOCK - 1] == 0 && buffer[2 * BLOCK] == 'x');
	if (fallocate(fd, FALLOC_FL_ZERO_RANGE, 2 * BLOCK, BLOCK) == 0) {
		need(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
		need(buffer[2 * BLOCK] == 0 && buffer[3 * BLOCK] == 'x');
	} else {
		need(errno == EOPNOTSUPP); /* tmpfs */
	}
	refused(fallocate(fd, 0, -1, 10), EINVAL);
}

static void holes(void)
{
	int fd = make("f", O_RDWR, 0644);
	need(pwrite(fd, "x", 1, 1 << 20) == 1);
	off_t data = lseek(fd, 0, SEEK_DATA);
	need(data > 0 && data <= 1 << 20);
	need(lseek(fd, 0, SEEK_HOLE) == 0);
	need(lseek(fd, 1 << 20, SEEK_HOLE) == (1 << 20) + 1);
	refused(lseek(fd, 2 << 20, SEEK_DATA), ENXIO);
	need(lseek(fd, 0, SEEK_END) == (1 << 20) + 1);
}

static void read_and_write(void)
{
	static char data[1 << 20], copy[1 << 20];
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = i ^ (i >> 8) ^ (i >> 16);
	int fd = make("f", O_RDWR, 0644);
	need(write(fd, data, sizeof(data)) == sizeof(data));
	need(pread(fd, copy, sizeof(copy), 0) == sizeof(copy) && memcmp(data, copy, sizeof(data)) == 0);
	need(pread(fd, copy, 1000, 777777) == 1000 && memcmp(data + 777777, copy, 1000) == 0);
	need(pread(fd, copy, 10, sizeof(data)) == 0 && pread(fd, copy, 10, sizeof(data) - 3) == 3);
	struct iovec parts[3] = { { copy, 1 }, { copy + 1, 5000 }, { copy + 5001, 100 } };
	need(preadv(fd, parts, 3, 12345) == 5101 && memcmp(data + 12345, copy, 5101) == 0);
	struct iovec pieces[2] = { { "abc", 3 }, { "defg", 4 } };
	need(pwritev(fd, pieces, 2, 100) == 7 && pread(fd, copy, 7, 100) == 7 && memcmp(copy, "abcdefg", 7) == 0);
	need(pwrite(fd, "end", 3, 3 << 20) == 3);
	need(pread(fd, copy, 16, (2 << 20)) == 16);
	for (int i = 0; i < 16; i++)
		need(copy[i] == 0);
}

static void mapped(void)
{
	int fd = make("f", O_RDWR, 0644);
	need(ftruncate(fd, 2 * BLOCK) == 0);
	char *private = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	need(private != MAP_FAILED && private[0] == 0);
	char *shared = mmap(NULL, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED) {
		need(errno == ENODEV); /* direct I/O without --allow-mmap */
		say("skip", "no shared mappings in this cache mode");
		_exit(SKIPPED);
	}
	strcpy(shared + BLOCK, "through the map");
	need(msync(shared, 2 * BLOCK, MS_SYNC) == 0);
	char buffer[16];
	need(pread(fd, buffer, 16, BLOCK) == 16 && strcmp(buffer, "through the map") == 0);
}

static void truncate_file(void)
{
	char buffer[16];
	make_file("f", "0123456789");
	need(truncate("f", 4) == 0 && has("f", "0123"));
	need(truncate("f", 8) == 0 && status_of("f").st_size == 8);
	int fd = open("f", O_RDWR);
	need(pread(fd, buffer, 16, 0) == 8 && memcmp(buffer, "0123\0\0\0\0", 8) == 0);
	need(ftruncate(fd, 0) == 0 && status_of("f").st_size == 0);
	refused(truncate("none", 0), ENOENT);
	refused(truncate(".", 0), EISDIR);
}

static void file_system_status(void)
{
	struct statvfs vfs;
	need(statvfs(".", &vfs) == 0 && vfs.f_bsize > 0 && vfs.f_blocks > 0 && vfs.f_namemax == 255);
}

static void synchronize(void)
{
	int fd = make("f", O_RDWR, 0644), dir = open(".", O_RDONLY | O_DIRECTORY);
	need(write(fd, "x", 1) == 1);
	need(fsync(fd) == 0 && fdatasync(fd) == 0);
	need(fsync(dir) == 0 && fdatasync(dir) == 0);
	need(syncfs(dir) == 0);
}

static void special_files(void)
{
	need(mkfifo("fifo", 0640) == 0 && S_ISFIFO(status_of("fifo").st_mode));
	int reader = open("fifo", O_RDONLY | O_NONBLOCK), writer = open("fifo", O_WRONLY);
	char c;
	need(reader >= 0 && writer >= 0 && write(writer, "z", 1) == 1 && read(reader, &c, 1) == 1 && c == 'z');
	int s = socket(AF_UNIX, SOCK_STREAM, 0);
	struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = "socket" };
	need(bind(s, (struct sockaddr *)&name, sizeof(name)) == 0 && S_ISSOCK(status_of("socket").st_mode));
	need(listen(s, 1) == 0);
	int c2 = socket(AF_UNIX, SOCK_STREAM, 0);
	need(connect(c2, (struct sockaddr *)&name, sizeof(name)) == 0);
	need(mknod("regular", S_IFREG | 0600, 0) == 0 && S_ISREG(status_of("regular").st_mode));
	refused(mknod("regular", S_IFREG | 0600, 0), EEXIST);
	if (mknod("null", S_IFCHR | 0666, makedev(1, 3)) == 0) {
		need(S_ISCHR(status_of("null").st_mode) && status_of("null").st_rdev == makedev(1, 3));
		int fd = open("null", O_WRONLY);
		need(fd >= 0 && write(fd, "x", 1) == 1);
	} else {
		need(errno == EPERM); /* a backend without CAP_MKNOD */
	}
}

static void links(void)
{
	char buffer[PATH_MAX], target[PATH_MAX];
	make_file("f", "x");
	need(link("f", "hard") == 0 && status_of("f").st_nlink == 2);
	need(status_of("f").st_ino == status_of("hard").st_ino);
	refused(link("f", "hard"), EEXIST);
	refused(link("none", "other"), ENOENT);
	need(unlink("f") == 0 && status_of("hard").st_nlink == 1 && has("hard", "x"));
	need(symlink("hard", "soft") == 0 && readlink("soft", buffer, sizeof(buffer)) == 4);
	need(status_of("soft").st_size == 4 && S_ISLNK(status_of("soft").st_mode) && has("soft", "x"));
	need(link("soft", "soft2") == 0 && S_ISLNK(status_of("soft2").st_mode));
	memset(target, 't', 4000);
	target[4000] = 0;
	need(symlink(target, "long") == 0 && readlink("long", buffer, sizeof(buffer)) == 4000);
	need(memcmp(buffer, target, 4000) == 0);
	need(symlink("loop2", "loop1") == 0 && symlink("loop1", "loop2") == 0);
	refused(open("loop1", O_RDONLY), ELOOP);
	need(symlink("nowhere", "dangling") == 0);
	refused(open("dangling", O_RDONLY), ENOENT);
	refused(readlink("hard", buffer, sizeof(buffer)), EINVAL);
}

static void extended_attributes(void)
{
	char value[70000], list[1024];
	make_file("f", "x");
	if (setxattr("f", "user.one", "value", 5, 0) != 0) {
		need(errno == EOPNOTSUPP);
		say("skip", "extended attributes are not served");
		_exit(SKIPPED);
	}
	need(getxattr("f", "user.one", NULL, 0) == 5);
	need(getxattr("f", "user.one", value, sizeof(value)) == 5 && memcmp(value, "value", 5) == 0);
	refused(getxattr("f", "user.one", value, 2), ERANGE);
	refused(setxattr("f", "user.one", "v", 1, XATTR_CREATE), EEXIST);
	refused(setxattr("f", "user.two", "v", 1, XATTR_REPLACE), ENODATA);
	need(setxattr("f", "user.one", "other", 5, XATTR_REPLACE) == 0);
	need(setxattr("f", "user.empty", "", 0, 0) == 0 && getxattr("f", "user.empty", value, 10) == 0);
	ssize_t size = listxattr("f", list, sizeof(list));
	need(size > 0 && memmem(list, size, "user.one", 9) && memmem(list, size, "user.empty", 11));
	need(listxattr("f", NULL, 0) == size);
	refused(listxattr("f", list, 3), ERANGE);
	need(removexattr("f", "user.one") == 0);
	refused(getxattr("f", "user.one", value, 10), ENODATA);
	refused(removexattr("f", "user.one"), ENODATA);
	int fd = open("f", O_RDWR);
	need(fsetxattr(fd, "user.fd", "x", 1, 0) == 0 && fgetxattr(fd, "user.fd", value, 9) == 1);
	need(setxattr(".", "user.dir", "d", 1, 0) == 0 && getxattr(".", "user.dir", value, 9) == 1);
	memset(value, 'v', 3000);
	need(setxattr("f", "user.big", value, 3000, 0) == 0 && getxattr("f", "user.big", NULL, 0) == 3000);
	refused(setxattr("f", "user.big", value, sizeof(value), 0), E2BIG);
}

static void times(void)
{
	struct timespec ts[2] = { { 1000000000, 123456789 }, { 1100000000, 987654321 } };
	make_file("f", "x");
	need(utimensat(AT_FDCWD, "f", ts, 0) == 0);
	struct stat st = status_of("f");
	need(st.st_atim.tv_sec == 1000000000 && st.st_atim.tv_nsec == 123456789);
	need(st.st_mtim.tv_sec == 1100000000 && st.st_mtim.tv_nsec == 987654321);
	ts[0].tv_nsec = UTIME_OMIT;
	ts[1].tv_nsec = UTIME_NOW;
	need(utimensat(AT_FDCWD, "f", ts, 0) == 0);
	st = status_of("f");
	need(st.st_atim.tv_sec == 1000000000 && st.st_mtim.tv_sec > 1600000000);
	need(symlink("f", "link") == 0);
	ts[0] = ts[1] = (struct timespec){ 1200000000, 5 };
	need(utimensat(AT_FDCWD, "link", ts, AT_SYMLINK_NOFOLLOW) == 0);
	need(status_of("link").st_mtim.tv_sec == 1200000000 && status_of("f").st_mtim.tv_sec > 1600000000);
	int fd = open("f", O_RDONLY);
	need(futimens(fd, ts) == 0 && status_of("f").st_mtim.tv_nsec == 5);
	struct stat before = status_of("f");
	usleep(20000);
	need((fd = open("f", O_WRONLY)) >= 0 && write(fd, "y", 1) == 1 && close(fd) == 0);
	st = status_of("f");
	need(st.st_mtim.tv_sec != before.st_mtim.tv_sec && st.st_ctim.tv_sec >= before.st_ctim.tv_sec);
}

static void modes_and_owners(void)
{
	make_file("f", "x");
	need(chmod("f", 04751) == 0 && (status_of("f").st_mode & 07777) == 04751);
	need(chown("f", 1000, 2000) == 0);
	struct stat st = status_of("f");
	need(st.st_uid == 1000 && st.st_gid == 2000 && (st.st_mode & 07777) == 0751);
	need(chown("f", -1, 3000) == 0 && status_of("f").st_uid == 1000 && status_of("f").st_gid == 3000);
	need(symlink("f", "link") == 0 && lchown("link", 5, 6) == 0);
	need(status_of("link").st_uid == 5 && status_of("f").st_uid == 1000);
	int fd = open("f", O_RDONLY);
	need(fchmod(fd, 0600) == 0 && fchown(fd, 7, 8) == 0 && status_of("f").st_uid == 7);
	need(mkdir("d", 0700) == 0 && chmod("d", 03777) == 0 && (status_of("d").st_mode & 07777) == 03777);
	refused(chmod("none", 0600), ENOENT);
	as_user(1000, 1000, refused(chmod("f", 0777), EPERM); refused(chown("f", 1000, 1000), EPERM););
}

static void write_drops_setuid(void)
{
	make_file("f", "x");
	need(chown("f", 1000, 1000) == 0 && chmod("f", 06777) == 0);
	as_user(2000, 2000, int fd = open("f", O_WRONLY); need(fd >= 0 && write(fd, "y", 1) == 1););
	need((status_of("f").st_mode & 07777) == 0777);
}

static void permissions(void)
{
	make_file("f", "x");
	need(chmod("f", 0640) == 0 && chown("f", 1000, 1000) == 0 && mkdir("d", 0700) == 0);
	need(access("f", R_OK | W_OK) == 0);
	refused(access("f", X_OK), EACCES);
	refused(access("none", F_OK), ENOENT);
	as_user(1000, 1000, need(access("f", R_OK | W_OK) == 0); need(open("f", O_RDWR) >= 0););
	as_user(2000, 1000, need(access("f", R_OK) == 0); refused(open("f", O_WRONLY), EACCES););
	as_user(2000, 2000, refused(open("f", O_RDONLY), EACCES); refused(open("d/x", O_RDONLY), EACCES);
		refused(unlink("f"), EACCES););
	need(chmod(".", 01777) == 0);
	as_user(2000, 2000, refused(unlink("f"), EPERM););
}

static void owners_of_created(void)
{
	need(chmod(".", 0777) == 0);
	as_user(1234, 2345, umask(027); make_file("file", "x"); need(mkdir("dir", 0777) == 0);
		need(symlink("x", "link") == 0); need(mkfifo("fifo", 0666) == 0););
	const char *names[] = { "file", "dir", "link", "fifo" };
	for (int i = 0; i < 4; i++)
		need(status_of(names[i]).st_uid == 1234 && status_of(names[i]).st_gid == 2345);
	need((status_of("file").st_mode & 07777) == 0640 && (status_of("dir").st_mode & 07777) == 0750);
	need((status_of("fifo").st_mode & 07777) == 0640);
	need(mkdir("group", 0777) == 0 && chown("group", 0, 4444) == 0 && chmod("group", 02777) == 0);
	as_user(1234, 2345, make_file("group/file", "x"); need(mkdir("group/dir", 0755) == 0););
	need(status_of("group/file").st_gid == 4444 && status_of("group/dir").st_gid == 4444);
	need(status_of("group/dir").st_mode & S_ISGID);
	umask(077);
	need(mkdir("private", 0777) == 0 && (status_of("private").st_mode & 07777) == 0700);
}

static void directories(void)
{
	need(mkdir("d", 0755) == 0);
	refused(mkdir("d", 0755), EEXIST);
	refused(mkdir("none/d", 0755), ENOENT);
	nlink_t before = status_of("d").st_nlink;
	need(mkdir("d/e", 0755) == 0 && status_of("d").st_nlink >= before);
	refused(rmdir("d"), ENOTEMPTY);
	refused(unlink("d"), EISDIR);
	make_file("f", "x");
	refused(rmdir("f"), ENOTDIR);
	need(rmdir("d/e") == 0 && rmdir("d") == 0);
	refused(rmdir("d"), ENOENT);
	need(mkdir("gone", 0755) == 0);
	int fd = open("gone", O_RDONLY | O_DIRECTORY);
	need(fd >= 0 && rmdir("gone") == 0);
	refused(openat(fd, "x", O_CREAT | O_WRONLY, 0600), ENOENT);
}

static void listing(void)
{
	enum { COUNT = 700 };
	char name[300], seen[COUNT] = { 0 };
	int dots = 0, found = 0;
	long place = -1;
	struct dirent *entry;
	need(mkdir("d", 0755) == 0);
	for (int i = 0; i < COUNT; i++) {
		snprintf(name, sizeof(name), "d/%04d-%0*d", i, i % 200 + 1, 0);
		make_file(name, "x");
	}
	DIR *d = opendir("d");
	need(d);
	for (int n = 0; (entry = readdir(d)); n++) {
		if (entry->d_name[0] == '.') {
			need(entry->d_type == DT_DIR);
			dots++;
			continue;
		}
		int i = atoi(entry->d_name);
		need(entry->d_type == DT_REG && i >= 0 && i < COUNT && !seen[i]);
		seen[i] = 1;
		found++;
		if (n == 400)
			place = telldir(d);
	}
	need(dots == 2 && found == COUNT);
	int after = 0;
	seekdir(d, place);
	while (readdir(d))
		after++;
	need(after == COUNT + 2 - 401);
	rewinddir(d);
	int all = 0;
	while (readdir(d))
		all++;
	need(all == COUNT + 2);
	rewinddir(d);
	for (int i = 0; i < COUNT; i++) { /* deleting while listing must terminate and leave nothing */
		snprintf(name, sizeof(name), "d/%04d-%0*d", i, i % 200 + 1, 0);
		need(unlink(name) == 0);
	}
	closedir(d);
	need(rmdir("d") == 0);
}

static void negative_lookups(void)
{
	struct stat st;
	refused(stat("later", &st), ENOENT);
	refused(stat("later", &st), ENOENT);
	make_file("later", "x");
	need(stat("later", &st) == 0 && unlink("later") == 0);
	refused(stat("later", &st), ENOENT);
	need(mkdir("later", 0755) == 0 && stat("later", &st) == 0 && S_ISDIR(st.st_mode));
}

static void names(void)
{
	char name[300];
	memset(name, 'n', sizeof(name));
	name[255] = 0;
	make_file(name, "long");
	need(has(name, "long") && unlink(name) == 0);
	name[255] = 'n';
	name[256] = 0;
	refused(open(name, O_CREAT | O_WRONLY, 0600), ENAMETOOLONG);
	refused(mkdir(name, 0700), ENAMETOOLONG);
	const char *odd[] = { "\xff\xfe\x80 not UTF-8", "new\nline", " ", "-rf", "...", "back\\slash", "\xe2\x82\xac" };
	for (size_t i = 0; i < sizeof(odd) / sizeof(*odd); i++) {
		int found = 0;
		struct dirent *entry;
		make_file(odd[i], "odd");
		DIR *d = opendir(".");
		while ((entry = readdir(d)))
			found += strcmp(entry->d_name, odd[i]) == 0;
		closedir(d);
		need(found == 1 && has(odd[i], "odd") && unlink(odd[i]) == 0);
	}
}

static void deep_tree(void)
{
	for (int i = 0; i < 60; i++)
		need(mkdir("deeper", 0755) == 0 && chdir("deeper") == 0);
	make_file("bottom", "x");
	need(has("../deeper/bottom", "x"));
	char path[PATH_MAX];
	need(getcwd(path, sizeof(path)) && strstr(path, "deeper/deeper/deeper"));
	need(unlink("bottom") == 0);
}

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

static void executed(void)
{
	char buffer[64] = "";
	int fd = make("script", O_WRONLY, 0755);
	need(dprintf(fd, "#!/bin/sh\necho ran\n") > 0 && close(fd) == 0);
	FILE *out = popen("./script", "r");
	need(out && fgets(buffer, sizeof(buffer), out) && strcmp(buffer, "ran\n") == 0 && pclose(out) == 0);
}

#define CHECK(function) { #function, function }
static const struct check {
	const char *name;
	void (*run)(void);
} checks[] = {
	CHECK(open_flags), CHECK(append_by_two), CHECK(tmpfile_and_link), CHECK(rename_kinds),
	CHECK(rename_over_open_file), CHECK(unlink_of_open_file), CHECK(copy_range), CHECK(allocate_kinds),
	CHECK(holes), CHECK(read_and_write), CHECK(mapped), CHECK(truncate_file), CHECK(file_system_status),
	CHECK(synchronize), CHECK(special_files), CHECK(links), CHECK(extended_attributes), CHECK(times),
	CHECK(modes_and_owners), CHECK(write_drops_setuid), CHECK(permissions), CHECK(owners_of_created),
	CHECK(directories), CHECK(listing), CHECK(negative_lookups), CHECK(names), CHECK(deep_tree), CHECK(locks),
	CHECK(two_threads), CHECK(many_open_files), CHECK(executed),
};

int main(int argc, char **argv)
{
	int failed = 0;
	if (argc < 2 || chdir(argv[1])) {
		fprintf(stderr, "usage: operations DIRECTORY [CHECK]\n");
		return 2;
	}
	umask(022);
	for (size_t i = 0; i < sizeof(checks) / sizeof(*checks); i++) {
		if (argc > 2 && strcmp(argv[2], checks[i].name))
			continue;
		check_name = checks[i].name;
		fflush(stdout);
		pid_t child = fork();
		if (child == 0) {
			need(mkdir(check_name, 0755) == 0 && chdir(check_name) == 0);
			checks[i].run();
			printf("ok %s\n", check_name);
			fflush(stdout);
			_exit(0);
		}
		int status;
		waitpid(child, &status, 0);
		if (WIFSIGNALED(status))
			printf("FAIL %s: signal %d\n", check_name, WTERMSIG(status));
		failed |= status != 0 && !(WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED);
	}
	return failed;
}
