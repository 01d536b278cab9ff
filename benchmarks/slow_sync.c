/* Makes every sync take at least SLOW_SYNC_US microseconds, as a cloud disk does.
 *
 * The real sync is done first; what is left of the time is slept. Loaded with LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

static int slow(const char *name, int fd) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const char *text = getenv("SLOW_SYNC_US");
    until.tv_nsec += (text ? atol(text) : 0) * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = real(fd);
    prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0); /* or a sleep is 50 microseconds too long */
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    return result;
}

int fdatasync(int fd) { return slow("fdatasync", fd); }
int fsync(int fd) { return slow("fsync", fd); }
