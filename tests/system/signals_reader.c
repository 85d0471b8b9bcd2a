/* Reads a signal board of layout version 1, written from the table in tolaria/signals/layout.py alone.
 *
 *   signals_reader PATH                  print the board, one "key value" per line
 *   signals_reader PATH wait LEVEL MS    sleep on the bell until some block shows at least LEVEL; exit 0, or 3 on timeout
 *
 * Exit status 2: not a board. Needs a little-endian Linux and a C11 compiler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BOARD = 5248, BELL = 256, BLOCKS = 320, BLOCK = 576, PAYLOAD = 256, ROLLBACK = 4928, ROLLBACK_PAYLOAD = 128, TRIES = 1000 };

static const char *NAMES[8] = {"tolaria", "kasmina", "tamiyo", "sentinel", "operator", "spare-1", "spare-2", "spare-3"};
static const unsigned char *board;

static uint32_t crc32(const unsigned char *bytes, size_t size) {
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

static uint64_t u64(const unsigned char *at) { uint64_t v; memcpy(&v, at, 8); return v; }
static uint32_t u32(const unsigned char *at) { uint32_t v; memcpy(&v, at, 4); return v; }

static uint64_t sequence_at(size_t at) {
    return atomic_load_explicit((_Atomic uint64_t *)(uintptr_t)(board + at), memory_order_acquire);
}

/* Copies the current payload of the block at `at`: 0 whole, 1 damaged, 2 torn. */
static int read_block(size_t at, size_t size, unsigned char *payload) {
    int fault = 2;
    for (int tried = 0; tried < TRIES; tried++) {
        uint64_t sequence = sequence_at(at);
        memcpy(payload, board + at + 64 + (sequence & 1) * size, size);
        atomic_thread_fence(memory_order_acquire);
        if (sequence_at(at) != sequence) { fault = 2; continue; }
        if (u64(payload) == sequence && crc32(payload, size - 4) == u32(payload + size - 4)) return 0;
        fault = 1;
    }
    return fault;
}

static uint32_t highest_level(void) {
    unsigned char payload[8][PAYLOAD];
    int whole[8];
    uint64_t void_until = 0;
    uint32_t level = 0;
    for (int i = 0; i < 8; i++) {
        whole[i] = read_block(BLOCKS + (size_t)i * BLOCK, PAYLOAD, payload[i]) == 0;
        if (whole[i] && (i == 0 || i == 4) && u64(payload[i] + 40) > void_until) void_until = u64(payload[i] + 40);
    }
    for (int i = 0; i < 8; i++)
        if (whole[i] && u64(payload[i] + 16) > void_until && u32(payload[i] + 56) > level) level = u32(payload[i] + 56);
    return level;
}

static void print_board(void) {
    static const char *conditions[3] = {"ok", "damaged", "torn"};
    unsigned char p[PAYLOAD];
    printf("run %.*s\n", (int)u32(board + 40), board + 64);
    for (int i = 0; i < 8; i++) {
        size_t at = BLOCKS + (size_t)i * BLOCK;
        int fault = read_block(at, PAYLOAD, p);
        printf("%s.condition %s\n", NAMES[i], conditions[fault]);
        printf("%s.heartbeat %llu\n", NAMES[i], (unsigned long long)sequence_at(at + 8));
        printf("%s.lane_heartbeat %llu\n", NAMES[i], (unsigned long long)sequence_at(at + 16));
        if (fault) continue;
        printf("%s.signal_id %llu\n", NAMES[i], (unsigned long long)u64(p + 8));
        printf("%s.raised %llu\n", NAMES[i], (unsigned long long)u64(p + 16));
        printf("%s.acknowledged_id %llu\n", NAMES[i], (unsigned long long)u64(p + 24));
        printf("%s.acknowledged %llu\n", NAMES[i], (unsigned long long)u64(p + 32));
        printf("%s.cleared %llu\n", NAMES[i], (unsigned long long)u64(p + 40));
        printf("%s.index %u\n", NAMES[i], u32(p + 48));
        printf("%s.pid %u\n", NAMES[i], u32(p + 52));
        printf("%s.level %u\n", NAMES[i], u32(p + 56));
        printf("%s.reason %.*s\n", NAMES[i], (int)u32(p + 60), (const char *)p + 64);
    }
    int fault = read_block(ROLLBACK, ROLLBACK_PAYLOAD, p);
    printf("rollback.condition %s\n", conditions[fault]);
    if (!fault)
        printf("rollback.step %llu\nrollback.deadline %llu\nrollback.changed %llu\nrollback.state %u\nrollback.tier %u\n"
               "rollback.pid %u\nrollback.id %.*s\n",
               (unsigned long long)u64(p + 8), (unsigned long long)u64(p + 16), (unsigned long long)u64(p + 24), u32(p + 32),
               u32(p + 36), u32(p + 40), (int)u32(p + 44), (const char *)p + 48);
    printf("effective %u\n", highest_level());
}

static int wait_for(uint32_t level, long timeout_ms) {
    uint32_t *bell = (uint32_t *)(uintptr_t)(board + BELL);
    struct timespec now, end, left;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += timeout_ms % 1000 * 1000000;
    for (;;) {
        uint32_t seen = atomic_load_explicit((_Atomic uint32_t *)bell, memory_order_acquire);
        if (highest_level() >= level) { printf("effective %u\n", highest_level()); return 0; }
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long left_ns = (end.tv_sec - now.tv_sec) * 1000000000LL + end.tv_nsec - now.tv_nsec;
        if (left_ns <= 0) return 3;
        left.tv_sec = left_ns / 1000000000LL;
        left.tv_nsec = left_ns % 1000000000LL;
        syscall(SYS_futex, bell, FUTEX_WAIT, seen, &left, NULL, 0);
    }
}

int main(int argc, char **argv) {
    struct stat status;
    int fd = argc < 2 ? -1 : open(argv[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) || status.st_size != BOARD) return fprintf(stderr, "no board of this size\n"), 2;
    board = mmap(NULL, BOARD, PROT_READ, MAP_SHARED, fd, 0);
    if (board == MAP_FAILED) return perror("mmap"), 2;
    if (memcmp(board, "TOLBOARD", 8) || u32(board + 8) != 1 || u64(board + 16) != BOARD || crc32(board, 252) != u32(board + 252))
        return fprintf(stderr, "not a board of version 1\n"), 2;
    if (argc == 5 && !strcmp(argv[2], "wait")) {
        printf("waiting\n");
        fflush(stdout);
        return wait_for((uint32_t)atoi(argv[3]), atol(argv[4]));
    }
    print_board();
    return 0;
}
