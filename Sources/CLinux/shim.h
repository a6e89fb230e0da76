#pragma once
// Linux calls that Swift's Glibc module leaves out because they need _GNU_SOURCE or are macros.
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

// renameat2(2) with RENAME_NOREPLACE: fails with EEXIST rather than replace `to`.
static inline int flotilla_rename_noreplace(const char *from, const char *to) {
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 1U);
}

// O_TMPFILE of open(2): a file without a name, gone when it is closed.
static const int flotilla_o_tmpfile = __O_TMPFILE;

#include <sys/prctl.h>

// Names the calling thread; the kernel cuts the name to 15 bytes.
static inline void flotilla_name_this_thread(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }
