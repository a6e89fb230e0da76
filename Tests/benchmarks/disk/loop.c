// The least a conversion of a streamOptimized VMDK to raw must do, without a converter around it: inflate every grain
// with libdeflate on several threads and write 4 MiB pieces with O_DIRECT into allocated space. No tables are checked,
// nothing is digested, no hole is kept, nothing survives a crash. What is left of a real converter's time is its own.
//
// usage: loop IN.vmdk OUT.raw [threads]
#define _GNU_SOURCE
#include <fcntl.h>
#include <libdeflate.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 4 << 20, SECTOR = 512 };

struct grain {
    uint64_t guest; // byte
    uint64_t file;  // byte of the zlib stream
    uint32_t size;
};

static const unsigned char *source;
static struct grain *grains;
static size_t count, next_grain;
static uint64_t grain_size, capacity;
static int target;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t number(uint64_t offset, int bytes) {
    uint64_t value = 0;
    memcpy(&value, source + offset, bytes);
    return value;
}

static void *work(void *unused) {
    (void)unused;
    struct libdeflate_decompressor *inflater = libdeflate_alloc_decompressor();
    void *buffer;
    if (posix_memalign(&buffer, 4096, CHUNK)) fail("memory");
    for (;;) {
        pthread_mutex_lock(&lock);
        size_t first = next_grain;
        uint64_t chunk = first < count ? grains[first].guest / CHUNK : 0;
        while (next_grain < count && grains[next_grain].guest / CHUNK == chunk) next_grain++;
        size_t end = next_grain;
        pthread_mutex_unlock(&lock);
        if (first == end) break;
        uint64_t length = capacity - chunk * CHUNK < CHUNK ? capacity - chunk * CHUNK : CHUNK;
        memset(buffer, 0, CHUNK);
        for (size_t i = first; i < end; i++) {
            size_t produced;
            if (libdeflate_zlib_decompress(inflater, source + grains[i].file, grains[i].size,
                                           (char *)buffer + grains[i].guest % CHUNK, grain_size, &produced))
                fail("inflate");
        }
        uint64_t aligned = (length + 4095) / 4096 * 4096;
        for (uint64_t done = 0; done < aligned;) {
            ssize_t written = pwrite(target, (char *)buffer + done, aligned - done, chunk * CHUNK + done);
            if (written < 0) fail("write");
            done += written;
        }
    }
    libdeflate_free_decompressor(inflater);
    free(buffer);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: loop IN.vmdk OUT.raw [threads]\n"), 2;
    int threads = argc > 3 ? atoi(argv[3]) : 6;
    int input = open(argv[1], O_RDONLY);
    struct stat info;
    if (input < 0 || fstat(input, &info)) fail(argv[1]);
    source = mmap(NULL, info.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, input, 0);
    if (source == MAP_FAILED) fail("mmap");
    capacity = number(12, 8) * SECTOR;
    grain_size = number(20, 8) * SECTOR;
    grains = malloc((capacity / grain_size + 1) * sizeof *grains);
    for (uint64_t at = number(64, 8) * SECTOR; at + SECTOR <= (uint64_t)info.st_size;) {
        uint32_t size = number(at + 8, 4);
        if (!size) break;
        grains[count++] = (struct grain){number(at, 8) * SECTOR, at + 12, size};
        at += (12 + size + SECTOR - 1) / SECTOR * SECTOR;
    }
    target = open(argv[2], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
    if (target < 0) fail(argv[2]);
    if (fallocate(target, 0, 0, (capacity + 4095) / 4096 * 4096)) fail("fallocate");
    pthread_t thread[64];
    for (int i = 0; i < threads && i < 64; i++) pthread_create(&thread[i], NULL, work, NULL);
    for (int i = 0; i < threads && i < 64; i++) pthread_join(thread[i], NULL);
    if (fdatasync(target)) fail("sync");
    return 0;
}
