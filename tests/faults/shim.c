/* A preload shim: the n-th write, fsync, rename, unlink or mkdir below one folder kills the process, fails, or is done
   by half. It sits under Python, SQLite and every native writer alike. `faults_arm` starts it; `faults_count` tells
   how often each kind was called since. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME, UNLINK, MKDIR, KINDS };
enum { KILL, FAIL, HALF };

static char root[PATH_MAX];
static size_t root_length;
static int armed, kind_wanted, action, error_number;
static long wanted, counts[KINDS];

void faults_arm(const char *folder, int kind, long at, int what, int number) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    kind_wanted = kind, wanted = at, action = what, error_number = number;
    memset(counts, 0, sizeof counts);
    armed = 1;
}

long faults_count(int kind) { return counts[kind]; }

static int below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int place_of(int fd, char *place) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, place, PATH_MAX - 1);
    if (length < 0) return 0;
    place[length] = 0;
    return 1;
}

static int named(int folder, const char *path) {
    char place[PATH_MAX];
    if (!armed) return 0;
    if (path[0] == '/') return below(path);
    if (folder == AT_FDCWD) return getcwd(place, sizeof place) && below(place);
    return place_of(folder, place) && below(place);
}

static int opened(int fd) {
    char place[PATH_MAX];
    return armed && place_of(fd, place) && below(place);
}

/* 1 if this call is the one, and is to fail or to be done by half; a kill does not come back. */
static int struck(int kind) {
    counts[kind]++;
    int again = action == FAIL && error_number == ENOSPC && counts[kind] > wanted; /* a full disk stays full */
    if (kind != kind_wanted || (counts[kind] != wanted && !again)) return 0;
    if (action == KILL) kill(getpid(), SIGKILL);
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAILS(kind) if (struck(kind)) { errno = error_number; return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (opened(fd) && struck(WRITE)) {
        if (action != HALF) { errno = error_number; return -1; }
        real(fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (opened(fd) && struck(WRITE)) {
        if (action != HALF) { errno = error_number; return -1; }
        real(fd, data, size / 2, at);
        kill(getpid(), SIGKILL);
    }
    return real(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

int fsync(int fd) { REAL(fsync); if (opened(fd)) FAILS(FSYNC) return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); if (opened(fd)) FAILS(FSYNC) return real(fd); }
int rename(const char *from, const char *to) { REAL(rename); if (named(AT_FDCWD, from)) FAILS(RENAME) return real(from, to); }
int unlink(const char *path) { REAL(unlink); if (named(AT_FDCWD, path)) FAILS(UNLINK) return real(path); }
int rmdir(const char *path) { REAL(rmdir); if (named(AT_FDCWD, path)) FAILS(UNLINK) return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); if (named(AT_FDCWD, path)) FAILS(MKDIR) return real(path, mode); }

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    if (named(a, from)) FAILS(RENAME)
    return real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    if (named(a, from)) FAILS(RENAME)
    return real(a, from, b, to, flags);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    if (named(folder, path)) FAILS(UNLINK)
    return real(folder, path, flags);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    if (named(folder, path)) FAILS(MKDIR)
    return real(folder, path, mode);
}
