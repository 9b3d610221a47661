/* For benchmarks/faults.py: watches what a process does to the files below one folder.

Loaded before the C library (LD_PRELOAD), so that the calls of Python, numpy, torch, libvips, HDF5
and Arrow all come through here. Once armed, every call of the wanted kinds on a path of the folder
counts as an event, and so does every large array that numpy allocates. Event number `at` fails with
an errno, or a signal is sent just before it. What happened is written to a log, a line an event. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, SYNC = 64, MAP = 128,
       ALLOC = 256 };
static const char *NAMES[] = {"open", "read", "write", "rename", "unlink", "mkdir", "fsync", "mmap",
                              "alloc"};
enum { LARGE = 1 << 17 }; /* bytes of an array that counts; less is hardly ever refused */

static char folder[4096];
static int kinds, error_number, signal_number, stays, log_fd = -1;
static long at, count;
static char *numpy_low, *numpy_high;

static int find_numpy(struct dl_phdr_info *library, size_t size, void *unused) {
  (void)size, (void)unused;
  if (!strstr(library->dlpi_name, "_multiarray_umath")) return 0;
  for (int i = 0; i < library->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &library->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    numpy_low = (char *)(library->dlpi_addr + part->p_vaddr);
    numpy_high = numpy_low + part->p_memsz;
  }
  return 1;
}

/* Called by the child; `number` 0 only logs, and one below 0 is a signal. `for_good`, as of a disk
that is full, all later writes fail as well. */
void histex_arm(const char *where, int of, long which, int number, int for_good, int log) {
  dl_iterate_phdr(find_numpy, NULL);
  strncpy(folder, where, sizeof folder - 1);
  at = which, count = 0, stays = for_good, log_fd = log;
  error_number = number > 0 ? number : 0, signal_number = number < 0 ? -number : 0;
  kinds = of;
}

static int event(int kind, const char *path) { /* 1 if the call is to fail; errno is set */
  int saved = errno, number = __builtin_ctz(kind);
  if (kind != ALLOC && strncmp(path, folder, strlen(folder))) return 0;
  long n = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  int full = stays && n > at && kind & (WRITE | MKDIR | SYNC);
  int now = at && (n == at || (full && !signal_number));
  if (!at || n == at) dprintf(log_fd, "%s %s\n", NAMES[number], path + (kind != ALLOC) * strlen(folder));
  errno = saved;
  if (now && signal_number) kill(getpid(), signal_number);
  if (!now || !error_number) return 0;
  errno = error_number;
  return 1;
}

static int event_at(int kind, int base, const char *path) {
  char whole[8192];
  if (!(kinds & kind) || !path) return 0;
  if (*path == '/' || base == AT_FDCWD) return event(kind, path);
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", base);
  ssize_t n = readlink(link, whole, 4096);
  if (n < 0) return 0;
  snprintf(whole + n, sizeof whole - n, *path ? "/%s" : "%s", path);
  return event(kind, whole);
}

static int event_of(int kind, int file) { return event_at(kind, file, ""); }

#define NEXT(name) \
  static __typeof__(name) *next; \
  if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WRAP(type, name, parameters, arguments, fails, result) \
  type name parameters { \
    NEXT(name); \
    if (fails) return result; \
    return next arguments; \
  }

#define MODE \
  va_list more; \
  va_start(more, flags); \
  mode_t mode = va_arg(more, mode_t); \
  va_end(more)

int open(const char *path, int flags, ...) {
  MODE;
  NEXT(open);
  return event_at(OPEN, AT_FDCWD, path) ? -1 : next(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE;
  NEXT(open64);
  return event_at(OPEN, AT_FDCWD, path) ? -1 : next(path, flags, mode);
}
int openat(int base, const char *path, int flags, ...) {
  MODE;
  NEXT(openat);
  return event_at(OPEN, base, path) ? -1 : next(base, path, flags, mode);
}
int openat64(int base, const char *path, int flags, ...) {
  MODE;
  NEXT(openat64);
  return event_at(OPEN, base, path) ? -1 : next(base, path, flags, mode);
}
WRAP(FILE *, fopen, (const char *path, const char *how), (path, how), event_at(OPEN, AT_FDCWD, path), NULL)
WRAP(FILE *, fopen64, (const char *path, const char *how), (path, how), event_at(OPEN, AT_FDCWD, path), NULL)
WRAP(DIR *, opendir, (const char *path), (path), event_at(OPEN, AT_FDCWD, path), NULL)
WRAP(ssize_t, read, (int file, void *to, size_t n), (file, to, n), event_of(READ, file), -1)
WRAP(ssize_t, pread, (int file, void *to, size_t n, off_t from), (file, to, n, from), event_of(READ, file), -1)
WRAP(ssize_t, pread64, (int file, void *to, size_t n, off64_t from), (file, to, n, from), event_of(READ, file), -1)
WRAP(size_t, fread, (void *to, size_t size, size_t n, FILE *file), (to, size, n, file), event_of(READ, fileno(file)), 0)
WRAP(ssize_t, write, (int file, const void *of, size_t n), (file, of, n), event_of(WRITE, file), -1)
WRAP(ssize_t, pwrite, (int file, const void *of, size_t n, off_t to), (file, of, n, to), event_of(WRITE, file), -1)
WRAP(ssize_t, pwrite64, (int file, const void *of, size_t n, off64_t to), (file, of, n, to), event_of(WRITE, file), -1)
WRAP(ssize_t, writev, (int file, const struct iovec *of, int n), (file, of, n), event_of(WRITE, file), -1)
WRAP(size_t, fwrite, (const void *of, size_t size, size_t n, FILE *file), (of, size, n, file), event_of(WRITE, fileno(file)), 0)
WRAP(int, ftruncate, (int file, off_t n), (file, n), event_of(WRITE, file), -1)
WRAP(int, ftruncate64, (int file, off64_t n), (file, n), event_of(WRITE, file), -1)
WRAP(int, rename, (const char *old, const char *new), (old, new), event_at(RENAME, AT_FDCWD, old), -1)
WRAP(int, unlink, (const char *path), (path), event_at(UNLINK, AT_FDCWD, path), -1)
WRAP(int, unlinkat, (int base, const char *path, int flags), (base, path, flags), event_at(UNLINK, base, path), -1)
WRAP(int, rmdir, (const char *path), (path), event_at(UNLINK, AT_FDCWD, path), -1)
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), event_at(MKDIR, AT_FDCWD, path), -1)
WRAP(int, fsync, (int file), (file), event_of(SYNC, file), -1)
WRAP(int, fdatasync, (int file), (file), event_of(SYNC, file), -1)
WRAP(void *, mmap, (void *to, size_t n, int how, int flags, int file, off_t from), (to, n, how, flags, file, from), file >= 0 && event_of(MAP, file), MAP_FAILED)
WRAP(void *, mmap64, (void *to, size_t n, int how, int flags, int file, off64_t from), (to, n, how, flags, file, from), file >= 0 && event_of(MAP, file), MAP_FAILED)

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

static int array_fails(size_t bytes, void *caller) {
  int of_numpy = (char *)caller >= numpy_low && (char *)caller < numpy_high;
  return (kinds & ALLOC) && bytes >= LARGE && of_numpy && event(ALLOC, "array");
}
void *malloc(size_t n) {
  return array_fails(n, __builtin_return_address(0)) ? NULL : __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
  return array_fails(n * size, __builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}
void *realloc(void *old, size_t n) {
  return array_fails(n, __builtin_return_address(0)) ? NULL : __libc_realloc(old, n);
}
