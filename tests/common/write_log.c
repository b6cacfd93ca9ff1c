/* LD_PRELOAD: writes each write and sync of the file $LOG_FILE to $LOG_OUT as [u8 op][u64 offset][u64 length][bytes], op 1 a write,
   2 a sync. Before each of them the shell command $LOG_BEFORE runs with the operation's number as its last argument. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static ino_t inode;
static FILE *out;
static char before[4096];
static unsigned number;

__attribute__((constructor)) static void begin(void) {
    struct stat s;
    unsetenv("LD_PRELOAD");
    if (!getenv("LOG_FILE") || stat(getenv("LOG_FILE"), &s)) return;
    inode = s.st_ino;
    out = fopen(getenv("LOG_OUT"), "a");
    snprintf(before, sizeof before, "%s", getenv("LOG_BEFORE"));
}

static int ours(int fd) { struct stat s; return out && !fstat(fd, &s) && s.st_ino == inode; }

static void log_it(uint8_t op, uint64_t offset, uint64_t length, const void *bytes) {
    char command[4200];
    snprintf(command, sizeof command, "%s %u", before, number++);
    if (system(command)) abort();
    fwrite(&op, 1, 1, out); fwrite(&offset, 8, 1, out); fwrite(&length, 8, 1, out); fwrite(bytes, 1, length, out);
    fflush(out);
}

#define NEXT(result, name, ...) static result (*next)(__VA_ARGS__); if (!next) next = dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *b, size_t n) {
    NEXT(ssize_t, "write", int, const void *, size_t);
    if (ours(fd)) log_it(1, lseek(fd, 0, SEEK_CUR), n, b);
    return next(fd, b, n);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off_t at) {
    NEXT(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    if (ours(fd)) log_it(1, at, n, b);
    return next(fd, b, n, at);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) { return pwrite64(fd, b, n, at); }
int fsync(int fd) { NEXT(int, "fsync", int); if (ours(fd)) log_it(2, 0, 0, ""); return next(fd); }
int fdatasync(int fd) { NEXT(int, "fdatasync", int); if (ours(fd)) log_it(2, 0, 0, ""); return next(fd); }
