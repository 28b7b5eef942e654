// As glibc.cpp, for what the static CUDA runtime calls. glibc 2.34 has these functions in libc, under a version of its
// own; before, libdl, libpthread and librt had them under the older one, which libc has, too. Where the library is
// linked on a newer Linux it does not name those three: on an older one torch's libraries do.

#if defined(__x86_64__)
#define FIRST "GLIBC_2.2.5"
#define JUMP "endbr64; jmp "
#define AWAY "@PLT"
#elif defined(__aarch64__)
#define FIRST "GLIBC_2.17"
#define JUMP "b "
#define AWAY ""
#endif

#define FROM(version, name)                               \
    __asm__(".symver older_" #name ", " #name "@" version \
            "\n"                                          \
            ".text\n"                                     \
            ".globl __wrap_" #name                        \
            "\n"                                          \
            ".hidden __wrap_" #name                       \
            "\n"                                          \
            ".type __wrap_" #name                         \
            ", %function\n"                               \
            "__wrap_" #name ": " JUMP "older_" #name AWAY "\n");

FROM(FIRST, dlclose)
FROM(FIRST, dlerror)
#if defined(__x86_64__)
FROM("GLIBC_2.3.4", dlmopen)
#else
FROM(FIRST, dlmopen)
#endif
FROM(FIRST, dlopen)
FROM(FIRST, dlsym)
FROM(FIRST, dlvsym)
FROM(FIRST, pthread_condattr_setpshared)
FROM(FIRST, pthread_create)
FROM(FIRST, pthread_detach)
FROM(FIRST, pthread_getspecific)
FROM(FIRST, pthread_join)
FROM(FIRST, pthread_key_create)
FROM(FIRST, pthread_key_delete)
FROM(FIRST, pthread_kill)
FROM(FIRST, pthread_mutex_trylock)
FROM(FIRST, pthread_mutexattr_destroy)
FROM(FIRST, pthread_mutexattr_init)
FROM(FIRST, pthread_mutexattr_setpshared)
FROM(FIRST, pthread_mutexattr_settype)
FROM(FIRST, pthread_once)
FROM(FIRST, pthread_rwlock_destroy)
FROM(FIRST, pthread_rwlock_init)
FROM(FIRST, pthread_rwlock_rdlock)
FROM(FIRST, pthread_rwlock_timedrdlock)
FROM(FIRST, pthread_rwlock_timedwrlock)
FROM(FIRST, pthread_rwlock_tryrdlock)
FROM(FIRST, pthread_rwlock_trywrlock)
FROM(FIRST, pthread_rwlock_unlock)
FROM(FIRST, pthread_rwlock_wrlock)
FROM(FIRST, pthread_rwlockattr_destroy)
FROM(FIRST, pthread_rwlockattr_init)
FROM(FIRST, pthread_rwlockattr_setpshared)
FROM(FIRST, pthread_setspecific)
FROM(FIRST, pthread_spin_destroy)
FROM(FIRST, pthread_spin_init)
FROM(FIRST, pthread_spin_lock)
FROM(FIRST, pthread_spin_trylock)
FROM(FIRST, pthread_spin_unlock)
FROM(FIRST, sem_destroy)
FROM(FIRST, sem_init)
FROM(FIRST, sem_post)
FROM(FIRST, sem_timedwait)
FROM(FIRST, sem_trywait)
FROM(FIRST, sem_wait)
FROM(FIRST, shm_open)
FROM(FIRST, shm_unlink)
