/*
 * Guest memory that is gone: a page of a file beyond its end, where the guest has a file mapped that others make
 * smaller. A load or store there is a SIGBUS. It gets a page of zeros of its own instead, and nobody else notices.
 */
#ifndef SERVER_SIGBUS_H
#define SERVER_SIGBUS_H

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { SIGBUS_RANGES = 2048, SIGBUS_PAGE = 4096 };

static struct {
    uintptr_t start, end;
} sigbus_ranges[SIGBUS_RANGES];

static void sigbus_mend(int number, siginfo_t *info, void *context)
{
    uintptr_t page = (uintptr_t)info->si_addr & ~(uintptr_t)(SIGBUS_PAGE - 1);

    (void)context;
    for (int i = 0; i < SIGBUS_RANGES; i++)
        if (page >= sigbus_ranges[i].start && page < sigbus_ranges[i].end &&
            mmap((void *)page, SIGBUS_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
                MAP_FAILED)
            return;
    /* Not ours: it happens again, and ends the process. */
    signal(number, SIG_DFL);
}

static inline void sigbus_install(void)
{
    struct sigaction action;

    memset(&action, 0, sizeof(action));
    action.sa_sigaction = sigbus_mend;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, NULL);
}

/* Whether there is room to remember it. */
static inline int sigbus_guard(void *start, size_t size)
{
    for (int i = 0; i < SIGBUS_RANGES; i++)
        if (sigbus_ranges[i].end == 0) {
            sigbus_ranges[i].start = (uintptr_t)start;
            sigbus_ranges[i].end = (uintptr_t)start + size;
            return 1;
        }
    return 0;
}

static inline void sigbus_forget(void *start)
{
    for (int i = 0; i < SIGBUS_RANGES; i++)
        if (sigbus_ranges[i].end != 0 && sigbus_ranges[i].start == (uintptr_t)start) {
            sigbus_ranges[i].end = 0;
            return;
        }
}

#endif
