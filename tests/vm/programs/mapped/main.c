/*
 * mapped FILE LENGTH STEP...: map a file shared, and do the steps, in their order.
 *
 *   put OFFSET BYTE   store a byte
 *   get OFFSET        load one, and print it as a number
 *   sync              msync(2)
 *   wait PATH         until that exists
 *   tell PATH         make that
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int count, char **words)
{
    int fd = open(words[1], O_RDWR);
    size_t length = strtoul(words[2], NULL, 0);
    volatile unsigned char *bytes;
    int i;

    if (fd < 0)
        fail(words[1]);
    bytes = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED)
        fail("mmap");
    for (i = 3; i < count; i++) {
        const char *step = words[i];

        if (strcmp(step, "sync") == 0) {
            if (msync((void *)bytes, length, MS_SYNC) < 0)
                fail("msync");
            continue;
        }
        i++;
        if (strcmp(step, "put") == 0) {
            bytes[strtoul(words[i], NULL, 0)] = (unsigned char)atoi(words[i + 1]);
            i++;
        } else if (strcmp(step, "get") == 0) {
            printf("%d\n", bytes[strtoul(words[i], NULL, 0)]);
        } else if (strcmp(step, "wait") == 0) {
            while (access(words[i], F_OK) < 0)
                usleep(1000);
        } else if (strcmp(step, "tell") == 0) {
            fflush(stdout);
            close(open(words[i], O_CREAT | O_WRONLY, 0600));
        }
    }
    return 0;
}
