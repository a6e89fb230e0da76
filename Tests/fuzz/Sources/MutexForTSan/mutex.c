// Tells ThreadSanitizer what it can't see of Synchronization.Mutex. Its fast paths are inlined into code that is
// instrumented; its slow paths, taken when threads contend, lie in libswiftSynchronization.so, which isn't: a lock
// taken or left there looks like no lock, and everything it protects like a race. These functions take the place of
// that library's, call them, and say what they do to the lock word: acquire and release. Without ThreadSanitizer they
// only pass the call on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>

extern void __tsan_acquire(void *address) __attribute__((weak));
extern void __tsan_release(void *address) __attribute__((weak));

#define CONTEXT __attribute__((swift_context))
#define SWIFT __attribute__((swiftcall))
#define LOCK_SLOW "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF"
#define UNLOCK_SLOW "$s15Synchronization12_MutexHandleV11_unlockSlowyyF"
#define TRY_LOCK_SLOW "$s15Synchronization12_MutexHandleV12_tryLockSlowSbyF"

SWIFT void lock_slow(uint32_t state, CONTEXT void *handle) __asm__(LOCK_SLOW);
SWIFT void unlock_slow(CONTEXT void *handle) __asm__(UNLOCK_SLOW);
SWIFT bool try_lock_slow(CONTEXT void *handle) __asm__(TRY_LOCK_SLOW);

SWIFT void lock_slow(uint32_t state, CONTEXT void *handle) {
    SWIFT void (*original)(uint32_t, CONTEXT void *) = dlsym(RTLD_NEXT, LOCK_SLOW);
    original(state, handle);
    if (__tsan_acquire) __tsan_acquire(handle);
}

SWIFT void unlock_slow(CONTEXT void *handle) {
    SWIFT void (*original)(CONTEXT void *) = dlsym(RTLD_NEXT, UNLOCK_SLOW);
    if (__tsan_release) __tsan_release(handle);
    original(handle);
}

SWIFT bool try_lock_slow(CONTEXT void *handle) {
    SWIFT bool (*original)(CONTEXT void *) = dlsym(RTLD_NEXT, TRY_LOCK_SLOW);
    bool taken = original(handle);
    if (taken && __tsan_acquire) __tsan_acquire(handle);
    return taken;
}
