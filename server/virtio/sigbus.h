/*
 * Guest memory that is gone: a page of a file beyond its end, as somebody made the file smaller. A load or store there
 * is a SIGBUS with BUS_ADRERR (mmap(2)). It gets a page of zeros of its own instead, so that whoever met it gets to an
 * end, and the range is marked as lost, for from now on we see other memory than the guest. Any other SIGBUS, as of a
 * hardware error, does what it does by default.
 */
#ifndef SERVER_SIGBUS_H
#define SERVER_SIGBUS_H

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIGBUS_RANGES = 2048 };

static struct {
    uintptr_t start, end;
    volatile sig_atomic_t lost;
} sigbus_ranges[SIGBUS_RANGES];

static uintptr_t sigbus_page_size;
static volatile sig_atomic_t sigbus_any_lost;

static int sigbus_mend(uintptr_t address)
{
    uintptr_t page = address & ~(sigbus_page_size - 1);

    for (int i = 0; i < SIGBUS_RANGES; i++)
        if (page >= sigbus_ranges[i].start && page < sigbus_ranges[i].end &&
            mmap((void *)page, sigbus_page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                 0) != MAP_FAILED) {
            sigbus_ranges[i].lost = 1;
            sigbus_any_lost = 1;
            return 1;
        }
    return 0;
}

static void sigbus_caught(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (info->si_code == BUS_ADRERR && sigbus_mend((uintptr_t)info->si_addr))
        return;
    /* It comes when this returns, and ends the process. */
    signal(number, SIG_DFL);
    raise(number);
}

static inline void sigbus_install(void)
{
    struct sigaction action;

    sigbus_page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = sigbus_caught;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, NULL);
}

/* The number of the range, or -1 where there is no room to remember it. */
static inline int sigbus_guard(void *start, size_t size)
{
    for (int i = 0; i < SIGBUS_RANGES; i++)
        if (sigbus_ranges[i].end == 0) {
            sigbus_ranges[i].lost = 0;
            sigbus_ranges[i].start = (uintptr_t)start;
            sigbus_ranges[i].end = (uintptr_t)start + size;
            return i;
        }
    return -1;
}

static inline int sigbus_is_lost(int range)
{
    return sigbus_any_lost && sigbus_ranges[range].lost;
}

static inline void sigbus_forget(int range)
{
    sigbus_ranges[range].end = 0;
}

#endif
