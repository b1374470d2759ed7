/*
 * random_io write SEED STEPS SIZE PATH...: change a file at random, and compare all that is read with a model, with
 *     what fsx does of what FUSE has: reads, writes, appends, loads, stores, truncations up and down, allocation,
 *     holes, zeroed ranges, copies within the file, fsync, close and open; beyond the end of a mapped file are zeros.
 *     Each step goes by one of the paths, which are the same file, mounted more than once perhaps.
 * random_io read SEED STEPS SIZE PATH: read it at random while somebody does that.
 *
 * A byte that is not zero has a hash of its offset in its lower half, so that a reader that knows nothing of the
 * writer sees when it gets bytes of another place.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_PATHS = 4, LONGEST = 300000, PAGE = 4096, CHUNK = 1 << 21 };

static unsigned char *model, *buffer;
static long size, most, step;
static char **paths;
static int fds[MOST_PATHS], path_count;
static unsigned long state;
static sigjmp_buf beyond;

static long below(long limit)
{
    state = state * 6364136223846793005UL + 1442695040888963407UL;
    return (long)((state >> 33) % (unsigned long)limit);
}

/* Often small, now and then at the border of a page or a chunk. */
static long place(long limit)
{
    long at = below(limit);

    if (below(4) == 0)
        at &= -PAGE;
    return at;
}

static unsigned char half(long offset)
{
    return (offset ^ offset >> 4 ^ offset >> 12 ^ offset >> 21) & 15;
}

static void fill(unsigned char *bytes, long offset, long length)
{
    unsigned char generation = (unsigned char)((1 + below(15)) << 4);
    long i;

    for (i = 0; i < length; i++)
        bytes[i] = generation | half(offset + i);
}

static void compare(const char *what, const unsigned char *bytes, long offset, long length)
{
    long i;

    for (i = 0; i < length; i++)
        if (bytes[i] != model[offset + i])
            errx(1, "step %ld: %s of %ld bytes at %ld, file size %ld: byte %ld is %d, not %d", step, what, length,
                 offset, size, offset + i, bytes[i], model[offset + i]);
}

static void check_size(int which)
{
    struct stat status;

    if (fstat(fds[which], &status) < 0)
        err(1, "step %ld: fstat", step);
    if (status.st_size != size)
        errx(1, "step %ld: %s has %ld bytes, not %ld", step, paths[which], (long)status.st_size, size);
}

static void resize(long now)
{
    if (now > size)
        memset(model + size, 0, now - size);
    size = now;
}

static void write_at(int fd, long offset, long length)
{
    if (offset > size)
        resize(offset);
    if (offset + length > size)
        resize(offset + length);
    fill(model + offset, offset, length);
    if (pwrite(fd, model + offset, length, offset) != length)
        err(1, "step %ld: pwrite of %ld bytes at %ld", step, length, offset);
}

static void read_at(int fd, long offset, long length)
{
    long wanted = offset >= size ? 0 : length < size - offset ? length : size - offset;
    long got = pread(fd, buffer, length, offset);

    if (got != wanted)
        err(1, "step %ld: pread of %ld bytes at %ld, file size %ld: %ld", step, length, offset, size, got);
    compare("pread", buffer, offset, got);
}

static void map(int which, long offset, long length, int store)
{
    long first = offset & -PAGE, end;
    unsigned char *bytes;

    bytes = mmap(NULL, offset + length - first, PROT_READ | PROT_WRITE, MAP_SHARED, fds[which], first);
    if (bytes == MAP_FAILED)
        err(1, "step %ld: mmap", step);
    if (store) {
        fill(model + offset, offset, length);
        memcpy(bytes + offset - first, model + offset, length);
        if (below(4) == 0 && msync(bytes, offset + length - first, MS_SYNC) < 0)
            err(1, "step %ld: msync", step);
    }
    compare(store ? "store" : "load", bytes + offset - first, offset, length);
    for (end = offset + length; offset + length == size && end % PAGE; end++)
        if (bytes[end - first])
            errx(1, "step %ld: byte %ld, beyond the end at %ld, is %d", step, end, size, bytes[end - first]);
    munmap(bytes, offset + length - first);
}

static void punch(int fd, long offset, long length)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0)
        err(1, "step %ld: punch", step);
    memset(model + offset, 0, offset + length > size ? size - offset : length);
}

/* What the host's file system may not have. */
static int supported(const char *what, long result)
{
    if (result >= 0)
        return 1;
    if (errno != EOPNOTSUPP)
        err(1, "step %ld: %s", step, what);
    printf("step %ld: no %s here\n", step, what);
    return 0;
}

static void zero(int fd, long offset, long length)
{
    int keep = below(2) ? FALLOC_FL_KEEP_SIZE : 0;

    if (!supported("zero range", fallocate(fd, FALLOC_FL_ZERO_RANGE | keep, offset, length)))
        return;
    if (!keep && offset + length > size)
        resize(offset + length);
    if (offset < size)
        memset(model + offset, 0, offset + length > size ? size - offset : length);
}

/* Within the file and a chunk, and by a multiple of 64 KiB, so that the bytes have a hash that fits there, too. */
static void copy(int fd, long from, long length)
{
    long to = (from & ~(31L << 16)) | below(32) << 16, last = from > to ? from : to;
    off_t in = from, out = to;
    long done = 0, got;

    if (length > CHUNK - last % CHUNK)
        length = CHUNK - last % CHUNK;
    if (labs(to - from) < length || to + length > most)
        return;
    for (; done < length; done += got) {
        got = copy_file_range(fd, &in, fd, &out, length - done, 0);
        if (got == 0)
            errx(1, "step %ld: copy of %ld bytes from %ld to %ld ends after %ld", step, length, from, to, done);
        if (!supported("copy", got))
            return;
    }
    if (to + length > size)
        resize(to + length);
    memcpy(model + to, model + from, length);
}

static void append(int which, long length)
{
    int fd = open(paths[which], O_WRONLY | O_APPEND);

    fill(model + size, size, length);
    if (fd < 0 || write(fd, model + size, length) != length)
        err(1, "step %ld: append of %ld bytes", step, length);
    size += length;
    close(fd);
}

static void extend(int fd, long offset, long length)
{
    if (fallocate(fd, 0, offset, length) < 0)
        err(1, "step %ld: fallocate", step);
    if (offset + length > size)
        resize(offset + length);
}

static void reopen(int which)
{
    close(fds[which]);
    fds[which] = open(paths[which], O_RDWR | O_CREAT, 0644);
    if (fds[which] < 0)
        err(1, "step %ld: %s", step, paths[which]);
}

static void change(void)
{
    int which = (int)below(path_count), fd = fds[which];
    long offset = place(most - LONGEST), length = 1 + below(below(3) ? 5000 : LONGEST);
    long there = size ? place(size) : 0, room = length < size - there ? length : size - there;

    check_size(which); /* Linux reads and writes by the size that it knows, where files are mapped, and does not ask */
    switch (below(20)) {
    case 0: case 1: case 2: read_at(fd, offset, length); break;
    case 3: case 4: write_at(fd, offset, length); break;
    case 5:
        if (size + length <= most)
            write_at(fd, size, length);
        break;
    case 6:
        offset = below(3) ? there : place(most);
        if (ftruncate(fd, offset) < 0)
            err(1, "step %ld: ftruncate", step);
        resize(offset);
        break;
    case 7: case 8: case 9:
        if (room)
            map(which, there, room, 1);
        break;
    case 10: case 11: case 12:
        if (room)
            map(which, there, room, 0);
        break;
    case 13:
        if (size)
            punch(fd, there, length);
        break;
    case 14: extend(fd, offset, length); break;
    case 15: reopen(which); break;
    case 16: zero(fd, offset, length); break;
    case 17:
        if (room)
            copy(fd, there, room);
        break;
    case 18:
        if (size + length <= most)
            append(which, length);
        break;
    case 19:
        if (fsync(fd) < 0)
            err(1, "step %ld: fsync", step);
        break;
    }
}

static void gone(int number)
{
    (void)number;
    siglongjmp(beyond, 1);
}

/* Whether all of it can belong there; it may be truncated meanwhile, which is SIGBUS. */
static void examine(const unsigned char *bytes, long offset, long length)
{
    if (sigsetjmp(beyond, 1))
        return;
    for (long i = 0; i < length; i++) {
        unsigned char byte = bytes[i];

        if (byte && (byte & 15) != half(offset + i))
            errx(1, "look %ld: byte %ld is %d", step, offset + i, byte);
    }
}

static void look(void)
{
    struct stat status;
    long offset, length;

    if (below(20) == 0)
        reopen(0);
    if (fstat(fds[0], &status) < 0)
        err(1, "fstat");
    if (status.st_size == 0)
        return;
    offset = place(status.st_size) & -PAGE;
    length = 1 + below(20000);
    if (length > status.st_size - offset)
        length = status.st_size - offset;
    if (below(2)) {
        unsigned char *bytes = mmap(NULL, length, PROT_READ, MAP_SHARED, fds[0], offset);

        if (bytes == MAP_FAILED)
            err(1, "mmap");
        examine(bytes, offset, length);
        munmap(bytes, length);
    } else {
        long got = pread(fds[0], buffer, length, offset);

        if (got < 0)
            err(1, "pread");
        examine(buffer, offset, got);
    }
}

int main(int count, char **words)
{
    int writes = count > 5 && strcmp(words[1], "write") == 0, i;
    long steps;

    if (count < 6 || count > 5 + MOST_PATHS)
        errx(2, "usage: random_io write|read SEED STEPS SIZE PATH...");
    state = strtoul(words[2], NULL, 0);
    steps = atol(words[3]);
    most = atol(words[4]);
    paths = words + 5;
    path_count = count - 5;
    model = calloc(1, most + LONGEST);
    buffer = malloc(LONGEST);
    signal(SIGBUS, writes ? SIG_DFL : gone);
    for (i = 0; i < path_count; i++) {
        fds[i] = -1;
        reopen(i);
    }
    if (writes && ftruncate(fds[0], 0) < 0)
        err(1, "%s", paths[0]);
    for (step = 0; step < steps; step++)
        if (writes)
            change();
        else
            look();
    if (writes) {
        check_size(0);
        for (long offset = 0; offset < size; offset += LONGEST)
            read_at(fds[0], offset, LONGEST);
    }
    return 0;
}
