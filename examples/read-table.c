/* Read a version table by its ABI (docs/reference/table.md): cc -o read-table read-table.c && ./read-table /dev/shm/vt */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { TABLE_ABI = 2, ABI = 1, COUNT = 2, SEQUENCE = 8, FLOOR = 16, SLOTS = 512 }; /* words of 8 bytes */

int main(int argc, char **argv)
{
    struct stat st;
    int fd = argc == 2 ? open(argv[1], O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
    if (fd < 0 || fstat(fd, &st) || st.st_size < SLOTS * 8)
        return fprintf(stderr, "usage: read-table TABLE, such as /dev/shm/vt\n"), 2;
    _Atomic uint64_t *words = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (words == MAP_FAILED || memcmp((void *)words, "VFSTABL", 8) || words[ABI] != TABLE_ABI ||
        words[COUNT] > (uint64_t)st.st_size / 8 - SLOTS)
        return fprintf(stderr, "%s is no version table of ABI %d\n", argv[1], TABLE_ABI), 1;
    uint64_t changed = 0, stamp = words[SEQUENCE], floor = words[FLOOR];
    for (uint64_t i = 0; i < words[COUNT]; i++)
        changed += words[SLOTS + i] != 0;
    printf("slots %" PRIu64 ", sequence %" PRIu64 ", floor %" PRIu64 " (%s), slots that ever changed %" PRIu64 "\n",
           words[COUNT], stamp, floor, floor >> 63 ? "trust nothing" : "trusted", changed);
    return 0;
}
