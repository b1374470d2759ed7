/* Opening, creating, renaming, linking and removing names. */
#include "check.h"

#include <limits.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

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

const struct check names_checks[] = {
	CHECK(open_flags),
	CHECK(tmpfile_and_link),
	CHECK(rename_kinds),
	CHECK(rename_over_open_file),
	CHECK(unlink_of_open_file),
	CHECK(special_files),
	CHECK(links),
	CHECK(negative_lookups),
	{ NULL, NULL },
};
