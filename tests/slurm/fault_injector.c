/* A fault injector for tests, to be loaded with LD_PRELOAD: file systems that fail, and a clock that is wrong.

   FAULT_INJECTOR_FILE    a file that says which fault there is now; while it does not exist, there is none. It holds an errno and a
                        part of a path: "28 /.labctl/results". Calls on paths with that part fail:
                        ENOSPC: what creates or writes a file; EROFS, EACCES: what changes one; any other (ESTALE): all calls.
   FAULT_INJECTOR_CLOCK_S by how many seconds the time of day is ahead, may be negative; clocks that only run are right. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum act { LOOK, CREATE, CHANGE };

#define REAL(name) ((__typeof__(name) *)real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* The errno that a call on this path is to fail with now; 0 for none. */
static int fault(const char *path, enum act act) {
    const char *file = getenv("FAULT_INJECTOR_FILE");
    char text[256], part[240];
    int code, before = errno;
    if (file == NULL || path == NULL) return 0;
    int handle = syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC);
    ssize_t size = handle < 0 ? 0 : syscall(SYS_read, handle, text, sizeof text - 1);
    if (handle >= 0) syscall(SYS_close, handle);
    errno = before;
    if (size <= 0) return 0;
    text[size] = 0;
    if (sscanf(text, "%d %239s", &code, part) != 2 || strstr(path, part) == NULL) return 0;
    if (code == ENOSPC) return act == CREATE ? code : 0;
    if (code == EROFS || code == EACCES) return act == LOOK ? 0 : code;
    return code;
}

static int fails(const char *path, enum act act) {
    int code = fault(path, act);
    if (code) errno = code;
    return code;
}

static int handle_fails(int handle) {
    char link[40], path[4096];
    if (getenv("FAULT_INJECTOR_FILE") == NULL) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(path, CREATE);
}

static enum act of_open(const char *path, int flags) {
    if ((flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0) return CREATE;
    return (flags & O_ACCMODE) == O_RDONLY ? LOOK : CHANGE;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, int);                                                                               \
        va_end(more);                                                                                                  \
        return fails(path, of_open(path, flags)) ? -1 : REAL(name)(path, flags, mode);                                 \
    }
#define OPEN_AT(name)                                                                                                  \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, int);                                                                               \
        va_end(more);                                                                                                  \
        return fails(path, of_open(path, flags)) ? -1 : REAL(name)(folder, path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

#define ON_PATH(type, failed, name, act, parameters, ...)                                                              \
    type name parameters { return fails(path, act) ? failed : REAL(name)(__VA_ARGS__); }
#define ON_HANDLE(type, name, parameters, ...)                                                                         \
    type name parameters { return handle_fails(handle) ? -1 : REAL(name)(__VA_ARGS__); }

ON_PATH(int, -1, stat, LOOK, (const char *path, struct stat *found), path, found)
ON_PATH(int, -1, stat64, LOOK, (const char *path, struct stat64 *found), path, found)
ON_PATH(int, -1, lstat, LOOK, (const char *path, struct stat *found), path, found)
ON_PATH(int, -1, lstat64, LOOK, (const char *path, struct stat64 *found), path, found)
ON_PATH(int, -1, fstatat, LOOK, (int folder, const char *path, struct stat *found, int flags), folder, path, found, flags)
ON_PATH(int, -1, fstatat64, LOOK, (int folder, const char *path, struct stat64 *found, int flags), folder, path, found, flags)
ON_PATH(int, -1, access, (mode & W_OK) ? CHANGE : LOOK, (const char *path, int mode), path, mode)
ON_PATH(int, -1, faccessat, (mode & W_OK) ? CHANGE : LOOK, (int folder, const char *path, int mode, int flags), folder, path, mode, flags)
ON_PATH(int, -1, mkdir, CREATE, (const char *path, mode_t mode), path, mode)
ON_PATH(int, -1, mkdirat, CREATE, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH(int, -1, rmdir, CHANGE, (const char *path), path)
ON_PATH(int, -1, unlink, CHANGE, (const char *path), path)
ON_PATH(int, -1, unlinkat, CHANGE, (int folder, const char *path, int flags), folder, path, flags)
ON_PATH(int, -1, rename, CHANGE, (const char *from, const char *path), from, path)
ON_PATH(int, -1, renameat, CHANGE, (int old, const char *from, int folder, const char *path), old, from, folder, path)
ON_PATH(int, -1, chmod, CHANGE, (const char *path, mode_t mode), path, mode)
ON_PATH(DIR *, NULL, opendir, LOOK, (const char *path), path)
ON_HANDLE(ssize_t, write, (int handle, const void *from, size_t size), handle, from, size)
ON_HANDLE(ssize_t, pwrite64, (int handle, const void *from, size_t size, off64_t at), handle, from, size, at)
ON_HANDLE(int, fsync, (int handle), handle)

/* ---- the clock */

static long ahead_s(void) {
    const char *text = getenv("FAULT_INJECTOR_CLOCK_S");
    return text == NULL ? 0 : atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    long result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead_s();
    return (int)result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact) != 0) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (result != NULL) *result = exact.tv_sec;
    return exact.tv_sec;
}
