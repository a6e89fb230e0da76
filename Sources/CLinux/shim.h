#pragma once
// Linux calls that Swift's Glibc module leaves out because they need _GNU_SOURCE or are macros.
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

// renameat2(2) with RENAME_NOREPLACE: fails with EEXIST rather than replace `to`.
static inline int flotilla_rename_noreplace(const char *from, const char *to) {
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 1U);
}

// openat2(2) with RESOLVE_NO_SYMLINKS (4): fails with ELOOP when any component of the path is a link.
static inline int flotilla_open_resolved(const char *path, int flags) {
    struct { unsigned long long flags, mode, resolve; } how = {(unsigned int)flags, 0, 4};
    return (int)syscall(437, AT_FDCWD, path, &how, sizeof how);
}

// O_TMPFILE of open(2): a file without a name, gone when it is closed.
static const int flotilla_o_tmpfile = __O_TMPFILE;

#include <sys/prctl.h>

// Names the calling thread; the kernel cuts the name to 15 bytes.
static inline void flotilla_name_this_thread(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }


// posix_fadvise(2) and sync_file_range(2), Linux's own numbers.
static inline int flotilla_fadvise_sequential(int fd) { return posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL); }
static inline int flotilla_fadvise_willneed(int fd, long long offset, long long length) {
    return posix_fadvise(fd, offset, length, POSIX_FADV_WILLNEED);
}
static inline int flotilla_fadvise_dontneed(int fd, long long offset, long long length) {
    return posix_fadvise(fd, offset, length, POSIX_FADV_DONTNEED);
}
// SYNC_FILE_RANGE_WRITE (2): starts write-back and does not wait for it.
static inline int flotilla_start_writeback(int fd, long long offset, long long length) {
    return (int)syscall(SYS_sync_file_range, fd, offset, length, 2U);
}
// fallocate(2), mode 0: allocates and extends the file.
static inline int flotilla_fallocate(int fd, long long offset, long long length) {
    return (int)syscall(SYS_fallocate, fd, 0, offset, length);
}
// O_DIRECT, which glibc hides behind _GNU_SOURCE and which differs between architectures.
static inline int flotilla_o_direct(void) { return __O_DIRECT; }

#include <linux/fs.h>
#include <sys/ioctl.h>

// Block devices: BLKGETSIZE64, BLKSSZGET and BLKROGET answer -1 when they fail.
static inline long long flotilla_device_size(int fd) {
    unsigned long long size = 0;
    return ioctl(fd, BLKGETSIZE64, &size) == 0 ? (long long)size : -1;
}
static inline int flotilla_device_block_size(int fd) {
    int size = 0;
    return ioctl(fd, BLKSSZGET, &size) == 0 ? size : -1;
}
static inline int flotilla_device_is_read_only(int fd) {
    int answer = 0;
    return ioctl(fd, BLKROGET, &answer) == 0 ? answer : -1;
}
// fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (3): zeros by giving the space back, or EOPNOTSUPP.
static inline int flotilla_punch_hole(int fd, unsigned long long offset, unsigned long long length) {
    return (int)syscall(SYS_fallocate, fd, 3, offset, length);
}
// BLKZEROOUT: zeros, written if the device can do no better.
static inline int flotilla_device_zero(int fd, unsigned long long offset, unsigned long long length) {
    unsigned long long range[2] = {offset, length};
    return ioctl(fd, BLKZEROOUT, &range);
}
static inline unsigned int flotilla_major(unsigned long long device) {
    return (unsigned int)((device >> 32 & 0xfffff000u) | (device >> 8 & 0xfffu));
}
static inline unsigned int flotilla_minor(unsigned long long device) {
    return (unsigned int)((device >> 12 & 0xffffff00u) | (device & 0xffu));
}
// memfd_create(2): a file in memory without a name.
static inline int flotilla_memory_file(const char *name) { return (int)syscall(SYS_memfd_create, name, 1U); }

#include <sys/timex.h>

// adjtimex(2): the most the clock may be off, in microseconds; -1 when nothing keeps it right, -2 when the kernel
// doesn't say.
static inline long flotilla_clock_error(void) {
    struct timex clock = {0};
    if (adjtimex(&clock) == -1) return -2;
    if (clock.status & STA_UNSYNC) return -1;
    return clock.maxerror > 0 ? clock.maxerror : 0;
}

#include <linux/fb.h>

// FBIOGET_CON2FBMAP on any framebuffer: the number of the one that the virtual console (from 1) is on, -1 for none, -2
// when the kernel doesn't say.
static inline int flotilla_console_framebuffer(int fd, unsigned int console) {
    struct fb_con2fbmap map = {.console = console};
    return ioctl(fd, FBIOGET_CON2FBMAP, &map) == 0 ? (int)map.framebuffer : -2;
}
