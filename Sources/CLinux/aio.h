#pragma once
// Linux's asynchronous I/O (io_setup(2), io_submit(2), io_getevents(2)), which glibc doesn't wrap.
#include <errno.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FLOTILLA_AIO_DEPTH = 64 };

// Pieces of memory that go to one place of a file.
struct flotilla_write {
    const struct iovec *pieces;
    int count;
    long long offset;
    // What pwritev(2) would return, or a negative errno.
    long long result;
};

// A context for FLOTILLA_AIO_DEPTH requests, or 0.
static inline unsigned long flotilla_aio_context(void) {
    aio_context_t context = 0;
    return syscall(SYS_io_setup, FLOTILLA_AIO_DEPTH, &context) == 0 ? context : 0;
}

static inline void flotilla_aio_free(unsigned long context) { syscall(SYS_io_destroy, context); }

// Makes up to FLOTILLA_AIO_DEPTH writes at once and waits for them all; no other thread uses the context meanwhile.
// Returns how many were submitted; the results of the others are not set. Whatever it returns, nothing is in flight.
static inline int flotilla_aio_write(unsigned long context, int fd, struct flotilla_write *writes, int count) {
    struct iocb requests[FLOTILLA_AIO_DEPTH], *list[FLOTILLA_AIO_DEPTH];
    struct io_event events[FLOTILLA_AIO_DEPTH];
    for (int i = 0; i < count; i++) {
        requests[i] = (struct iocb){
            .aio_data = i, .aio_lio_opcode = IOCB_CMD_PWRITEV, .aio_fildes = fd,
            .aio_buf = (unsigned long)writes[i].pieces, .aio_nbytes = writes[i].count, .aio_offset = writes[i].offset,
        };
        list[i] = &requests[i];
    }
    int submitted = 0, done = 0;
    while (submitted < count) {
        long more = syscall(SYS_io_submit, context, count - submitted, list + submitted);
        if (more <= 0) break;
        submitted += more;
    }
    while (done < submitted) {
        long more = syscall(SYS_io_getevents, context, 1, submitted - done, events, 0);
        if (more < 0 && errno == EINTR) continue;
        if (more <= 0) {
            // Doesn't return before the last request has ended.
            flotilla_aio_free(context);
            return -1;
        }
        for (int i = 0; i < more; i++) writes[events[i].data].result = events[i].res;
        done += more;
    }
    return submitted;
}
