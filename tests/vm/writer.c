/* Writes stamped blocks of 4096 bytes to a file, past the page cache, and tells which of them have reached the disk.
 *   writer fill FILE BLOCKS
 *   writer write FILE FIRST TOLD       from sequence number FIRST on, until killed; TOLD has the last acknowledged number, and outlives the machine if it is on a disk
 *   writer verify FILE FIRST-LAST...   each acknowledged block, or a later one in its place; and no block that nobody wrote */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 4096, TOGETHER = 8 };

static uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static void stamp(uint64_t *words, uint64_t block, uint64_t sequence) {
    for (uint64_t at = 0; at < BLOCK / 8; at++)
        words[at] = mix(mix(block ^ mix(sequence)) + at);
    words[0] = block;
    words[1] = sequence;
}

int main(int argc, char **argv) {
    static uint64_t buffer[BLOCK / 8] __attribute__((aligned(BLOCK))), wanted[BLOCK / 8];
    if (argc < 3)
        errx(64, "writer fill|write|verify FILE ...");
    int file = open(argv[2], O_RDWR | O_DIRECT | O_CREAT, 0600);
    if (file < 0)
        err(1, "%s", argv[2]);
    struct stat stat;
    if (fstat(file, &stat))
        err(1, "fstat");
    uint64_t blocks = stat.st_size / BLOCK;
    if (!strcmp(argv[1], "fill")) {
        blocks = strtoull(argv[3], NULL, 10);
        for (uint64_t block = 0; block < blocks; block++) {
            stamp(buffer, block, 0);
            if (pwrite(file, buffer, BLOCK, block * BLOCK) != BLOCK)
                err(1, "pwrite");
        }
        return fsync(file) ? 1 : 0;
    }
    if (!strcmp(argv[1], "write")) {
        int told = open(argv[4], O_WRONLY | O_CREAT | O_DSYNC, 0600);
        for (uint64_t sequence = strtoull(argv[3], NULL, 10);;) {
            for (int one = 0; one < TOGETHER; one++, sequence++) {
                uint64_t block = mix(sequence) % blocks;
                stamp(buffer, block, sequence);
                if (pwrite(file, buffer, BLOCK, block * BLOCK) != BLOCK)
                    err(1, "pwrite");
            }
            if (fdatasync(file))
                err(1, "fdatasync");
            char line[32];
            int bytes = snprintf(line, sizeof line, "%20" PRIu64 "\n", sequence - 1);
            if (pwrite(told, line, bytes, 0) != bytes)
                err(1, "%s", argv[4]);
        }
    }
    uint64_t *least = calloc(blocks, sizeof *least), bad = 0, stale = 0, first = UINT64_MAX;
    for (int at = 3; at < argc; at++) {
        uint64_t from, to;
        if (sscanf(argv[at], "%" SCNu64 "-%" SCNu64, &from, &to) != 2)
            errx(64, "%s", argv[at]);
        for (uint64_t sequence = from; sequence <= to; sequence++)
            if (sequence > least[mix(sequence) % blocks])
                least[mix(sequence) % blocks] = sequence;
    }
    for (uint64_t block = 0; block < blocks; block++) {
        if (pread(file, buffer, BLOCK, block * BLOCK) != BLOCK)
            err(1, "pread");
        stamp(wanted, block, buffer[1]);
        int is_bad = memcmp(wanted, buffer, BLOCK) != 0, is_stale = !is_bad && buffer[1] < least[block];
        bad += is_bad, stale += is_stale;
        if ((is_bad || is_stale) && first == UINT64_MAX)
            first = block;
    }
    printf("%" PRIu64 " blocks, %" PRIu64 " bad, %" PRIu64 " stale", blocks, bad, stale);
    if (bad + stale)
        printf(", the first at %" PRIu64, first);
    puts("");
    return bad + stale > 0;
}
