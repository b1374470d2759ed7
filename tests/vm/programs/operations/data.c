/* Reading, writing, mapping, allocating, copying and executing what is in files. */
#include "check.h"

#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/uio.h>

static void append_by_two(void)
{
	int a = make("f", O_WRONLY | O_APPEND, 0644), b = open("f", O_WRONLY | O_APPEND);
	need(b >= 0);
	for (int i = 0; i < 100; i++)
		need(write(i % 2 ? a : b, "0123456789", 10) == 10);
	need(status_of("f").st_size == 1000);
}

static void append_switched(void)
{
	make_file("f", "foo\n");
	make_file("from", "123");
	int fd = open("f", O_RDWR | O_APPEND), from = open("from", O_RDONLY);
	need(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_APPEND) == 0);
	loff_t to = 3;
	need(copy_file_range(from, NULL, fd, &to, 1, 0) == 1);
	need(pwrite(fd, "X", 1, 0) == 1 && lseek(fd, 1, SEEK_SET) == 1 && write(fd, "Y", 1) == 1 && has("f", "XYo1"));
	need(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_APPEND) == 0);
	need(pwrite(fd, "end", 3, 0) == 3 && write(fd, "!", 1) == 1 && has("f", "XYo1end!"));
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
	if (data == 0) {
		need(lseek(fd, 0, SEEK_HOLE) == (1 << 20) + 1);
		say("skip", "all is data");
		_exit(SKIPPED);
	}
	need(data > 0 && data <= 1 << 20);
	need(lseek(fd, 0, SEEK_HOLE) == 0);
	need(lseek(fd, 1 << 20, SEEK_HOLE) == (1 << 20) + 1);
	refused(lseek(fd, 2 << 20, SEEK_DATA), ENXIO);
	need(lseek(fd, 0, SEEK_END) == (1 << 20) + 1);
}

/* What was just written is data, whether or not it is on its way to the host yet. */
static void holes_beside_new_data(void)
{
	static char data[22166];
	memset(data, 'd', sizeof(data));
	int fd = make("f", O_RDWR, 0644);
	need(write(fd, data, sizeof(data)) == sizeof(data));
	need(lseek(fd, 0, SEEK_DATA) == 0 && lseek(fd, 0, SEEK_HOLE) == sizeof(data));
	need(ftruncate(fd, 1 << 20) == 0 && pwrite(fd, "e", 1, 900000) == 1);
	/* Wherever holes are found, the byte is in none of them. */
	off_t start = 0, end = 0;
	while (end <= 900000) {
		need((start = lseek(fd, end, SEEK_DATA)) >= end && start <= 900000);
		need((end = lseek(fd, start, SEEK_HOLE)) > start);
	}
	int other = open("f", O_RDONLY);
	need(lseek(other, 900000, SEEK_DATA) == 900000 && lseek(other, 900000, SEEK_HOLE) > 900000);
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

static void executed(void)
{
	char buffer[64] = "";
	int fd = make("script", O_WRONLY, 0755);
	need(dprintf(fd, "#!/bin/sh\necho ran\n") > 0 && close(fd) == 0);
	FILE *out = popen("./script", "r");
	need(out && fgets(buffer, sizeof(buffer), out) && strcmp(buffer, "ran\n") == 0 && pclose(out) == 0);
}

const struct check data_checks[] = {
	CHECK(append_by_two),
	CHECK(append_switched),
	CHECK(copy_range),
	CHECK(allocate_kinds),
	CHECK(holes),
	CHECK(holes_beside_new_data),
	CHECK(read_and_write),
	CHECK(mapped),
	CHECK(truncate_file),
	CHECK(file_system_status),
	CHECK(synchronize),
	CHECK(executed),
	{ NULL, NULL },
};
