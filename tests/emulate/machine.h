// The host twin of csrc/cuda/{cluster,io,reduce}.cuh: a thread is a fiber, a cluster of blocks runs in one
// process, fibers take turns at barriers in an order drawn from a seed. Stricter than a card: shared memory
// starts as NaN and is out of bounds for AddressSanitizer before a block's first thread runs and after its
// last has left; asynchronous copies land only when waited for; a thread that misses a barrier ends the run
// as a deadlock. Map traffic is counted.
#pragma once

#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

namespace fused_attn::cuda {

using std::max;
using std::min;

struct alignas(16) Words4 {
    uint32_t word[4];
};
struct alignas(8) Words2 {
    uint32_t word[2];
};

namespace machine {

[[noreturn]] inline void fail(const std::string& why) {
    std::fprintf(stderr, "emulator: %s\n", why.c_str());
    std::exit(3);
}

struct Fiber;

struct Barrier {
    int expected = 0, arrived = 0;
    uint64_t phase = 0;
    std::vector<Fiber*> waiting;
    uint64_t arrive();
};

struct Block {
    char* shared = nullptr;
    size_t bytes = 0;
    int rank = 0, started = 0, left = 0;
    int64_t x = 0;
    int y = 0;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<std::vector<char>> slots;  // a warp's shuffled values, 16 bytes a lane
    struct Copy {
        char* to;
        const char* from;
        uint32_t bytes;
    };
    std::vector<Copy> copies;
    int64_t copies_expected = -1, copies_added = 0;
};

struct Fiber {
    ucontext_t start;
    void* here[5];  // where it waits, once started
    bool started = false;
    std::unique_ptr<char[]> stack;
    Block* block = nullptr;
    int thread = 0, cluster_barriers = 0;
    uint64_t cluster_phase = 0;
    bool dropped = false;
    const char* where = "running";
};

struct Range {
    std::string name;
    const char* begin;
    size_t bytes;
    int64_t read = 0, written = 0;
};

struct Machine {
    std::mt19937 random{1};
    int drop_cluster_barrier = -1;  // leave out the n-th cluster barrier of every thread
    std::vector<Range> maps;
    void* scheduler[5];
    std::vector<Fiber*> ready;
    Fiber* current = nullptr;
    std::vector<Block> blocks;
    Barrier cluster;
    int threads = 0, finished = 0;
    std::function<void()> kernel;

    void count(const void* p, size_t bytes, bool write) {
        for (Range& r : maps) {
            if (p >= r.begin && p < r.begin + r.bytes) (write ? r.written : r.read) += bytes;
        }
    }
};
inline Machine& machine() {
    static Machine m;
    return m;
}

// A fiber starts on its own stack by setcontext; from then on it and the scheduler change places by the compiler's own
// jumps. swapcontext and longjmp make a system call each time, and the former clears the shadow of a whole stack.
[[gnu::noinline, gnu::no_sanitize_address]] inline void resume(Fiber& fiber) {
    if (__builtin_setjmp(machine().scheduler)) return;
    if (fiber.started) __builtin_longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}
[[gnu::noinline, gnu::no_sanitize_address]] inline void suspend(Fiber& fiber) {
    if (!__builtin_setjmp(fiber.here)) __builtin_longjmp(machine().scheduler, 1);
}

inline uint64_t Barrier::arrive() {
    const uint64_t mine = phase;
    if (++arrived == expected) {
        arrived = 0;
        ++phase;
        auto& ready = machine().ready;
        ready.insert(ready.end(), waiting.begin(), waiting.end());
        waiting.clear();
    }
    return mine;
}
inline void wait(Barrier& barrier, uint64_t phase, const char* where) {
    Machine& m = machine();
    if (barrier.phase != phase) return;
    Fiber* me = m.current;
    me->where = where;
    barrier.waiting.push_back(me);
    suspend(*me);
    me->where = "running";
}
inline void arrive_and_wait(Barrier& barrier, const char* where) { wait(barrier, barrier.arrive(), where); }

inline void run_fiber() {
    Machine& m = machine();
    Block& block = *m.current->block;
    if (block.started++ == 0) ASAN_UNPOISON_MEMORY_REGION(block.shared, block.bytes);
    m.kernel();
    m.current->where = "left";
    ++m.finished;
    if (++block.left == m.threads) {
        if (!block.copies.empty()) fail("a block left while a copy into its shared memory was under way");
        std::memset(block.shared, 0xff, block.bytes);
        ASAN_POISON_MEMORY_REGION(block.shared, block.bytes);
    }
    suspend(*m.current);  // for good
}

// Run a kernel: grid_x * grid_y blocks in clusters of `ranks` along x, one cluster after the other.
inline void launch(int64_t grid_x, int grid_y, int ranks, int threads, size_t shared_bytes,
                   std::function<void()> kernel) {
    Machine& m = machine();
    m.kernel = std::move(kernel);
    m.threads = threads;
    constexpr size_t kStack = 128 << 10;
    static std::vector<Fiber> fibers;
    if (fibers.size() < size_t(ranks * threads)) fibers = std::vector<Fiber>(ranks * threads);
    for (int64_t cluster = 0; cluster < grid_x / ranks * grid_y; ++cluster) {
        m.blocks = std::vector<Block>(ranks);
        m.cluster = Barrier{ranks * threads};
        m.finished = 0;
        m.ready.clear();
        for (int rank = 0; rank < ranks; ++rank) {
            Block& block = m.blocks[rank];
            block.rank = rank;
            block.x = cluster % (grid_x / ranks) * ranks + rank;
            block.y = static_cast<int>(cluster / (grid_x / ranks));
            block.bytes = shared_bytes;
            block.shared = static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
            std::memset(block.shared, 0xff, shared_bytes);
            ASAN_POISON_MEMORY_REGION(block.shared, shared_bytes);
            block.barrier.expected = threads;
            block.warps = std::vector<Barrier>(threads / 32, Barrier{32});
            block.slots.assign(threads / 32, std::vector<char>(32 * 16));
            for (int thread = 0; thread < threads; ++thread) {
                Fiber& fiber = fibers[rank * threads + thread];
                if (!fiber.stack) fiber.stack.reset(new char[kStack]);
                fiber.block = &block;
                fiber.thread = thread;
                fiber.cluster_barriers = 0;
                fiber.dropped = false;
                fiber.started = false;
                getcontext(&fiber.start);
                fiber.start.uc_stack.ss_sp = fiber.stack.get();
                fiber.start.uc_stack.ss_size = kStack;
                fiber.start.uc_link = nullptr;
                makecontext(&fiber.start, run_fiber, 0);
                m.ready.push_back(&fiber);
            }
        }
        const int ahead = static_cast<int>(m.random() % ranks);
        while (!m.ready.empty()) {
            size_t pick = m.random() % m.ready.size();  // one block runs ahead of the others
            for (int tries = 0; tries < 16 && m.ready[pick]->block->rank != ahead; ++tries)
                pick = m.random() % m.ready.size();
            std::swap(m.ready[pick], m.ready.back());
            m.current = m.ready.back();
            m.ready.pop_back();
            resume(*m.current);
        }
        if (m.finished != ranks * threads) {
            std::string why = "deadlock:";
            for (int i = 0; i < ranks * threads; ++i) {
                if (std::strcmp(fibers[i].where, "left") != 0) {
                    why += " block " + std::to_string(i / threads) + " thread " + std::to_string(i % threads) +
                           " waits at the " + fibers[i].where + ";";
                    break;
                }
            }
            fail(why + " " + std::to_string(ranks * threads - m.finished) + " threads never left");
        }
        for (Block& block : m.blocks) {
            ASAN_UNPOISON_MEMORY_REGION(block.shared, shared_bytes);
            std::free(block.shared);
        }
    }
}

inline Block& block() { return *machine().current->block; }

}  // namespace machine

// ---- cluster.cuh ----
inline int thread_rank() { return machine::machine().current->thread; }
inline int thread_count() { return machine::machine().threads; }
inline int64_t block_index() { return machine::block().x; }
inline int block_row() { return machine::block().y; }
inline char* shared_memory() { return machine::block().shared; }
inline int cluster_rank() { return machine::block().rank; }
inline int cluster_size() { return static_cast<int>(machine::machine().blocks.size()); }
inline void block_barrier() { machine::arrive_and_wait(machine::block().barrier, "block barrier"); }
inline void cluster_arrive() {
    auto& m = machine::machine();
    machine::Fiber& me = *m.current;
    me.dropped = me.cluster_barriers++ == m.drop_cluster_barrier;
    if (!me.dropped) me.cluster_phase = m.cluster.arrive();
}
inline void cluster_wait() {
    auto& m = machine::machine();
    if (!m.current->dropped) machine::wait(m.cluster, m.current->cluster_phase, "cluster barrier");
}
template <class P>
P* of_rank(P* pointer, int rank) {
    char* const mine = machine::block().shared;
    return reinterpret_cast<P*>(machine::machine().blocks[rank].shared +
                                (reinterpret_cast<const char*>(pointer) - mine));
}

// ---- reduce.cuh ----
template <class V>
V shuffle_xor(V value, int mask) {
    auto& block = machine::block();
    const int thread = thread_rank(), warp = thread / 32, lane = thread % 32;
    std::memcpy(&block.slots[warp][lane * 16], &value, sizeof(V));
    machine::arrive_and_wait(block.warps[warp], "shuffle");
    V other;
    std::memcpy(&other, &block.slots[warp][(lane ^ mask) * 16], sizeof(V));
    machine::arrive_and_wait(block.warps[warp], "shuffle");
    return other;
}

// ---- io.cuh ----
using Half = _Float16;
struct BFloat16 {
    uint16_t bits;
};
inline float widen(Half v) { return static_cast<float>(v); }
inline void narrow(float v, Half& to) { to = static_cast<Half>(v); }
inline float widen(BFloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void narrow(float v, BFloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    to.bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T read_map(const T* p) {
    machine::machine().count(p, sizeof(T), false);
    return *p;
}
template <class T>
void write_map(T* p, const T& v) {
    machine::machine().count(p, sizeof(T), true);
    *p = v;
}

inline void copies_begin(uint64_t*, uint32_t bytes) { machine::block().copies_expected = bytes; }
inline void copies_add(uint64_t*, char* to, const char* from, uint32_t bytes) {
    if (thread_rank() != 0) return;
    auto& block = machine::block();
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        machine::fail("a bulk copy is not aligned to 16 bytes");
    if (block.copies_expected < 0) machine::fail("a copy before its barrier was set up");
    if (bytes) block.copies.push_back({to, from, bytes});
    block.copies_added += bytes;
}
inline void copies_wait(uint64_t*) {
    auto& block = machine::block();
    if (block.copies_expected != block.copies_added)
        machine::fail("copies of " + std::to_string(block.copies_added) + " bytes, " +
                      std::to_string(block.copies_expected) + " announced");
    for (const auto& copy : block.copies) {
        machine::machine().count(copy.from, copy.bytes, false);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    block.copies.clear();
}

}  // namespace fused_attn::cuda
