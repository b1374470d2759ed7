/* Times, modes, owners, permissions and extended attributes. */
#include "check.h"

#include <grp.h>
#include <sys/xattr.h>

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

static void trusted_attributes(void)
{
	char list[1024];
	make_file("f", "x");
	if (setxattr("f", "trusted.one", "1", 1, 0) != 0) {
		need(errno == EOPNOTSUPP);
		say("skip", "extended attributes are not served");
		_exit(SKIPPED);
	}
	need(setxattr("f", "user.one", "1", 1, 0) == 0);
	ssize_t size = listxattr("f", list, sizeof(list));
	need(size > 0 && memmem(list, size, "trusted.one", 12));
	as_user(1000, 1000, size = listxattr("f", list, sizeof(list));
		need(size > 0 && memmem(list, size, "user.one", 9) && !memmem(list, size, "trusted.", 8)););
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

/* Who is in the group of a directory by a supplementary group only. */
static void set_group_id_of_a_member(void)
{
	gid_t group = 500;
	need(mkdir("g", 0755) == 0 && chown("g", 0, group) == 0 && chmod("g", 02775) == 0);
	pid_t child = fork();
	if (child == 0) {
		need(setgroups(1, &group) == 0 && setgid(1000) == 0 && setuid(1000) == 0);
		umask(022);
		need(open("g/created", O_CREAT | O_WRONLY, 02755) >= 0 && mknod("g/node", S_IFREG | 02755, 0) == 0);
		need(mkdir("g/dir", 0755) == 0);
		_exit(0);
	}
	int status;
	need(waitpid(child, &status, 0) == child && status == 0);
	const char *names[] = { "g/created", "g/node", "g/dir" };
	for (int i = 0; i < 3; i++)
		need(status_of(names[i]).st_gid == group && (status_of(names[i]).st_mode & 07777) == 02755);
	as_user(1000, 1000, refused(open("g/none", O_CREAT | O_WRONLY, 0755), EACCES););
	need(chmod("g", 02777) == 0);
	as_user(1000, 1000, need(open("g/stranger", O_CREAT | O_WRONLY, 02755) >= 0););
	need(status_of("g/stranger").st_gid == group && (status_of("g/stranger").st_mode & 07777) == 0755);
}

const struct check attributes_checks[] = {
	CHECK(extended_attributes),
	CHECK(trusted_attributes),
	CHECK(times),
	CHECK(modes_and_owners),
	CHECK(write_drops_setuid),
	CHECK(permissions),
	CHECK(owners_of_created),
	CHECK(set_group_id_of_a_member),
	{ NULL, NULL },
};
