// parallel_for on torch's own OpenMP pool, found at run time, so that no second pool competes with it for
// the cores and the module links no OpenMP runtime.
//
// Both OpenMP entry points are looked up by name: GOMP_parallel (GCC's runtime, torch's Linux wheels) and
// __kmpc_fork_call (LLVM's and Intel's). A process may hold two runtimes, so the one of torch is chosen.
// Work is claimed in pieces from one atomic counter, so a thread that the runtime does not deliver is not waited for.
#include "qkern/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qk {
namespace {

struct Work {
    RangeFn fn;
    void* context;
    int64_t total;
    int64_t grain;
    int64_t shares;  // a claim takes one of this many of what is left
    std::atomic<int64_t> next{0};

    void run() {
        int64_t begin = next.load(std::memory_order_relaxed);
        while (begin < total) {
            const int64_t left = total - begin;
            const int64_t size = std::min(left, std::max(grain, left / shares / grain * grain));
            if (!next.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) continue;
            fn(context, begin, begin + size);
            begin = next.load(std::memory_order_relaxed);
        }
    }
};

// Shares for each thread.
constexpr int64_t kShares = 3;

// A thread inside parallel_for runs nested calls serially.
thread_local bool tls_inside = false;

struct Inside {
    Inside() { tls_inside = true; }
    ~Inside() { tls_inside = false; }
};

void run_worker(Work* work) {
    Inside inside;
    work->run();
}

std::atomic_flag g_pool_busy = ATOMIC_FLAG_INIT;
std::atomic<bool> g_forked_child{false};

// ---- OpenMP runtimes ----------------------------------------------------------------------------------

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInParallel = int (*)();
using KmpMicro = void (*)(int32_t*, int32_t*, ...);
using KmpFork = void (*)(void*, int32_t, KmpMicro, ...);
using KmpPushThreads = void (*)(void*, int32_t, int32_t);
using KmpThreadNum = int32_t (*)(void*);

// The head of LLVM's ident_t; the runtime reads only these fields.
struct KmpIdent {
    int32_t reserved_1 = 0, flags = 2, reserved_2 = 0, reserved_3 = 0;
    const char* source = ";qkern;parallel_for;0;0;;";
};

struct OpenMp {
    GompParallel gomp = nullptr;
    OmpInParallel in_parallel = nullptr;
    KmpFork kmp_fork = nullptr;
    KmpPushThreads kmp_push = nullptr;
    KmpThreadNum kmp_thread = nullptr;
};

#if !defined(_WIN32)
// Whether two functions come from one shared library.
bool same_library(void* a, void* b) {
    Dl_info of_a{}, of_b{};
    return dladdr(a, &of_a) != 0 && dladdr(b, &of_b) != 0 && of_a.dli_fbase == of_b.dli_fbase;
}
#endif

OpenMp find_openmp() {
    OpenMp found;
#if !defined(_WIN32)
    const auto symbol = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
    found.in_parallel = reinterpret_cast<OmpInParallel>(symbol("omp_in_parallel"));
    void* const gomp = symbol("GOMP_parallel");
    found.kmp_fork = reinterpret_cast<KmpFork>(symbol("__kmpc_fork_call"));
    found.kmp_push = reinterpret_cast<KmpPushThreads>(symbol("__kmpc_push_num_threads"));
    found.kmp_thread = reinterpret_cast<KmpThreadNum>(symbol("__kmpc_global_thread_num"));
    if (!found.kmp_push || !found.kmp_thread) found.kmp_fork = nullptr;
    // LLVM's runtime exports GOMP_parallel as well; then torch runs on it, whichever compiler built torch, and
    // its own entry point serves. Two libraries: another package (MKL, for one) brought LLVM's beside torch's.
#if !defined(__APPLE__)
    if (found.kmp_fork && gomp && !same_library(gomp, reinterpret_cast<void*>(found.kmp_fork))) found.kmp_fork = nullptr;
#endif
    if (!found.kmp_fork) found.gomp = reinterpret_cast<GompParallel>(gomp);
#endif
    return found;
}

const OpenMp& openmp() {
    static const OpenMp found = find_openmp();
    return found;
}

void gomp_entry(void* work) { run_worker(static_cast<Work*>(work)); }

void kmp_entry(int32_t*, int32_t*, Work* work) { run_worker(work); }

void run_openmp(Work& work, int threads) {
    const OpenMp& omp = openmp();
    if (omp.gomp) {
        omp.gomp(&gomp_entry, &work, static_cast<unsigned>(threads), 0);
        return;
    }
    static KmpIdent ident;
    omp.kmp_push(&ident, omp.kmp_thread(&ident), threads);
    omp.kmp_fork(&ident, 1, reinterpret_cast<KmpMicro>(&kmp_entry), &work);
}

// ---- own pool, for processes without an OpenMP runtime --------------------------------------------------

class Pool {
  public:
    // Never destroyed: a worker may still wait on it while static objects go away.
    static Pool& instance() {
        static Pool* pool = new Pool;
        return *pool;
    }

    void run(Work& work, int threads) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                try {
                    workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { loop(index); });
                } catch (const std::system_error&) {
                    break;  // the system has no thread left: those that exist do the work
                }
                workers_.back().detach();
            }
            work_ = &work;
            wanted_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        run_worker(&work);
        std::unique_lock<std::mutex> lock(mutex_);
        // A worker that has not started yet finds no work and is not waited for.
        work_ = nullptr;
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void loop(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            Work* work = index < wanted_ ? work_ : nullptr;
            if (!work) continue;
            ++active_;
            lock.unlock();
            run_worker(work);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Work* work_ = nullptr;
    uint64_t generation_ = 0;
    int wanted_ = 0;
    int active_ = 0;
};

#if !defined(_WIN32)
// The threads of the parent's pool do not exist in the child: entering it would hang. Registered when the
// module is loaded, since torch may have started its pool before our first call.
[[maybe_unused]] const int g_fork_watched = pthread_atfork(nullptr, nullptr, [] {
    g_forked_child.store(true);
    g_pool_busy.clear();
});
#endif

}  // namespace

const char* pool_name() {
    if (openmp().gomp) return "gomp";
    return openmp().kmp_fork ? "kmp" : "own";
}

void parallel_for(int64_t total, int64_t unit, int64_t work_of_one, int threads, RangeFn fn, void* context) {
    if (total <= 0) return;
    unit = std::max<int64_t>(unit, 1);
    const int64_t unit_work = std::min(std::max<int64_t>(work_of_one, 1), kPieceWork) * unit;
    const int64_t grain = (kPieceWork + unit_work - 1) / unit_work * unit;
    const int64_t grains = (total + grain - 1) / grain;
    threads = static_cast<int>(std::min<int64_t>(threads, grains));
    const bool serial = threads <= 1 || tls_inside || g_forked_child.load(std::memory_order_relaxed) ||
                        (openmp().in_parallel && openmp().in_parallel());
    if (serial || g_pool_busy.test_and_set(std::memory_order_acquire)) {
        fn(context, 0, total);
        return;
    }
    // Claims shrink towards the end, so that the threads end together and a late one costs little.
    Work work{fn, context, total, grain, static_cast<int64_t>(threads) * kShares, {}};
    if (openmp().gomp || openmp().kmp_fork) {
        run_openmp(work, threads);
    } else {
        Pool::instance().run(work, threads);
    }
    g_pool_busy.clear(std::memory_order_release);
}

}  // namespace qk
