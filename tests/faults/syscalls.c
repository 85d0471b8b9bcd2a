/* Preloaded into a process: counts the calls that change files, and has the n-th kill the process or fail.
 *
 *   cc -shared -fPIC -O2 syscalls.c -o syscalls.so -ldl
 *
 * `syscalls_arm(n, mode)` begins to count; mode 0 counts only, 1 kills with SIGKILL before the n-th call, 2 has the
 * n-th call fail with ENOSPC or EIO by turns, 3 has it and all later ones fail. `syscalls_counted()` returns the count.
 *
 * `syscalls_record(d)` has each call that has changed files written to the descriptor d: a line "CALL INODE OFFSET
 * LENGTH-OF-PATH LENGTH-OF-OTHER-PATH LENGTH", then both paths and the bytes that were written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long count, chosen;
static int armed, mode;

void syscalls_arm(long n, int how) { count = 0; chosen = n; mode = how; armed = 1; }
static int record = -1;

void syscalls_record(int descriptor) { record = descriptor; }
long syscalls_counted(void) { armed = 0; return count; }

/* Returns whether this call fails. */
static int meet(void) {
    if (!armed) return 0;
    count++;
    if (mode == 1 && count == chosen) { kill(getpid(), SIGKILL); pause(); }
    if ((mode == 2 && count == chosen) || (mode == 3 && count >= chosen)) {
        errno = count % 2 ? ENOSPC : EIO;
        return 1;
    }
    return 0;
}

static int changes(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) == 0 && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
}

static void put(const void *bytes, size_t length) {
    for (const char *at = bytes; length > 0;) {
        long written = syscall(SYS_write, record, at, length);
        if (written <= 0) _exit(99);
        at += written;
        length -= written;
    }
}

static void note(const char *call, ino_t inode, off_t at, const char *path, const char *other, const void *b, size_t n) {
    char line[200];
    int before = errno;
    int length = snprintf(line, sizeof line, "%s %llu %lld %zu %zu %zu\n", call, (unsigned long long)inode, (long long)at,
                          strlen(path), strlen(other), n);
    put(line, length);
    put(path, strlen(path));
    put(other, strlen(other));
    put(b, n);
    errno = before;
}

/* The absolute path of one that is relative to a directory. */
static const char *absolute(int directory, const char *path, char *buffer) {
    char link[64];
    if (path[0] == '/') return path;
    if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, buffer, PATH_MAX);
    if (length < 0) _exit(98);
    snprintf(buffer + length, PATH_MAX, "/%s", path);
    return buffer;
}

static void note_paths(const char *call, int c, const char *a, int d, const char *b) {
    char one[2 * PATH_MAX], other[2 * PATH_MAX];
    if (record >= 0) note(call, 0, 0, absolute(c, a, one), b ? absolute(d, b, other) : "", NULL, 0);
}

/* Notes that bytes have been written at an offset; of files that are no regular ones nothing. */
static void note_bytes(int d, const void *b, ssize_t n, off_t at) {
    struct stat found;
    if (record >= 0 && n > 0 && fstat(d, &found) == 0 && S_ISREG(found.st_mode)) note("write", found.st_ino, at, "", "", b, n);
}

static void note_inode(const char *call, int d, off_t at) {
    struct stat found;
    if (record >= 0 && fstat(d, &found) == 0) note(call, found.st_ino, at, "", "", NULL, 0);
}

static void note_made(const char *directory) {
    struct stat found;
    char buffer[2 * PATH_MAX];
    if (record >= 0 && stat(directory, &found) == 0)
        note("mkdir", found.st_ino, 0, absolute(AT_FDCWD, directory, buffer), "", NULL, 0);
}

/* Where the next write goes. */
static off_t place_of(int d) {
    struct stat found;
    if (fcntl(d, F_GETFL) & O_APPEND && fstat(d, &found) == 0) return found.st_size;
    return lseek(d, 0, SEEK_CUR);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int d, const void *b, size_t n) {
    REAL(write);
    if (!changes(d)) return real(d, b, n);
    if (meet()) return -1;
    off_t at = place_of(d);
    ssize_t written = real(d, b, n);
    note_bytes(d, b, written, at);
    return written;
}
ssize_t writev(int d, const struct iovec *v, int n) { /* a short write is allowed */
    REAL(writev);
    return changes(d) && n > 0 ? write(d, v[0].iov_base, v[0].iov_len) : real(d, v, n);
}
ssize_t pwrite(int d, const void *b, size_t n, off_t o) {
    REAL(pwrite);
    if (meet()) return -1;
    ssize_t written = real(d, b, n, o);
    note_bytes(d, b, written, o);
    return written;
}
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) {
    REAL(pwrite64);
    if (meet()) return -1;
    ssize_t written = real(d, b, n, o);
    note_bytes(d, b, written, o);
    return written;
}
int fsync(int d) { REAL(fsync); if (meet()) return -1; int done = real(d); if (!done) note_inode("sync", d, 0); return done; }
int fdatasync(int d) { REAL(fdatasync); if (meet()) return -1; int done = real(d); if (!done) note_inode("sync", d, 0); return done; }
int ftruncate(int d, off_t n) { REAL(ftruncate); if (meet()) return -1; int done = real(d, n); if (!done) note_inode("truncate", d, n); return done; }
int ftruncate64(int d, off64_t n) { REAL(ftruncate64); if (meet()) return -1; int done = real(d, n); if (!done) note_inode("truncate", d, n); return done; }
int rename(const char *a, const char *b) { REAL(rename); if (meet()) return -1; int done = real(a, b); if (!done) note_paths("rename", AT_FDCWD, a, AT_FDCWD, b); return done; }
int renameat(int c, const char *a, int d, const char *b) { REAL(renameat); if (meet()) return -1; int done = real(c, a, d, b); if (!done) note_paths("rename", c, a, d, b); return done; }
int unlink(const char *a) { REAL(unlink); if (meet()) return -1; int done = real(a); if (!done) note_paths("unlink", AT_FDCWD, a, 0, NULL); return done; }
int unlinkat(int d, const char *a, int f) { REAL(unlinkat); if (meet()) return -1; int done = real(d, a, f); if (!done) note_paths("unlink", d, a, 0, NULL); return done; }
int rmdir(const char *a) { REAL(rmdir); if (meet()) return -1; int done = real(a); if (!done) note_paths("unlink", AT_FDCWD, a, 0, NULL); return done; }
int mkdir(const char *a, mode_t m) { REAL(mkdir); if (meet()) return -1; int done = real(a, m); if (!done) note_made(a); return done; }

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        REAL(name);                                                                 \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        mode_t permissions = flags & O_CREAT ? va_arg(rest, mode_t) : 0;            \
        va_end(rest);                                                               \
        if (flags & (O_CREAT | O_TRUNC) && meet()) return -1;                       \
        int opened = real(path, flags, permissions);                                \
        struct stat found;                                                          \
        if (record >= 0 && opened >= 0 && flags & (O_CREAT | O_TRUNC) && fstat(opened, &found) == 0) { \
            char buffer[2 * PATH_MAX];                                              \
            note("open", found.st_ino, 0, absolute(AT_FDCWD, path, buffer), "", NULL, 0); \
            if (flags & O_TRUNC) note("truncate", found.st_ino, 0, "", "", NULL, 0); \
        }                                                                           \
        return opened;                                                              \
    }
OPEN(open)
OPEN(open64)
