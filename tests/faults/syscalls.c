/* Preloaded into a process: counts the calls that change files, and has the n-th kill the process or fail.
 *
 *   cc -shared -fPIC -O2 syscalls.c -o syscalls.so -ldl
 *
 * `syscalls_arm(n, mode)` begins to count; mode 0 counts only, 1 kills with SIGKILL before the n-th call, 2 has the
 * n-th call fail with ENOSPC or EIO by turns, 3 has it and all later ones fail. `syscalls_counted()` returns the count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long count, chosen;
static int armed, mode;

void syscalls_arm(long n, int how) { count = 0; chosen = n; mode = how; armed = 1; }
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

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int d, const void *b, size_t n) { REAL(write); if (changes(d) && meet()) return -1; return real(d, b, n); }
ssize_t writev(int d, const struct iovec *v, int n) { REAL(writev); if (changes(d) && meet()) return -1; return real(d, v, n); }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) { REAL(pwrite); if (meet()) return -1; return real(d, b, n, o); }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { REAL(pwrite64); if (meet()) return -1; return real(d, b, n, o); }
int fsync(int d) { REAL(fsync); if (meet()) return -1; return real(d); }
int fdatasync(int d) { REAL(fdatasync); if (meet()) return -1; return real(d); }
int ftruncate(int d, off_t n) { REAL(ftruncate); if (meet()) return -1; return real(d, n); }
int ftruncate64(int d, off64_t n) { REAL(ftruncate64); if (meet()) return -1; return real(d, n); }
int rename(const char *a, const char *b) { REAL(rename); if (meet()) return -1; return real(a, b); }
int renameat(int c, const char *a, int d, const char *b) { REAL(renameat); if (meet()) return -1; return real(c, a, d, b); }
int unlink(const char *a) { REAL(unlink); if (meet()) return -1; return real(a); }
int unlinkat(int d, const char *a, int f) { REAL(unlinkat); if (meet()) return -1; return real(d, a, f); }
int rmdir(const char *a) { REAL(rmdir); if (meet()) return -1; return real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); if (meet()) return -1; return real(a, m); }

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        REAL(name);                                                                 \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        mode_t permissions = flags & O_CREAT ? va_arg(rest, mode_t) : 0;            \
        va_end(rest);                                                               \
        if (flags & (O_CREAT | O_TRUNC) && meet()) return -1;                       \
        return real(path, flags, permissions);                                      \
    }
OPEN(open)
OPEN(open64)
