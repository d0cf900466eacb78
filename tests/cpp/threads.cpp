// parallel_for on its own pool, as tests/sanitize.sh runs it under the thread sanitizer: several threads that call
// at once, more threads than cores, calls inside calls, and a forked child. Exit code 0 if every result is right.
#include <stdint.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <set>
#include <string_view>
#include <thread>
#include <vector>

#include "qkern/parallel.h"

namespace {

constexpr int64_t kTotal = 1000;
constexpr int kCallers = 4, kRounds = 300;

std::atomic<int> g_wrong{0};

void expect(bool right, const char* what) {
    if (right) return;
    g_wrong.fetch_add(1);
    fprintf(stderr, "qkern_threads: %s\n", what);
}

// One call: every index once, pieces that start at multiples of the unit, and what the pieces wrote is there
// when it returns. The vector is not atomic: a call that returned too early is a race.
void check_call(int64_t total, int64_t unit, int threads, int64_t salt) {
    std::vector<int64_t> out(static_cast<size_t>(total));
    qk::parallel_for(total, unit, qk::kPieceWork, threads, [&](int64_t begin, int64_t end) {
        expect(begin % unit == 0 && begin < end && end <= total, "a piece is not whole units");
        for (int64_t i = begin; i < end; ++i) out[static_cast<size_t>(i)] += i + salt;
    });
    for (int64_t i = 0; i < total; ++i) {
        if (out[static_cast<size_t>(i)] != i + salt) return expect(false, "an index was skipped or done twice");
    }
}

void check_sizes() {
    for (const int64_t total : {int64_t{0}, int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, kTotal}) {
        for (const int64_t unit : {1, 8, 16}) {
            for (const int threads : {0, 1, 2, 3, 16}) check_call(total, unit, threads, threads);
        }
    }
}

// All callers at once: one gets the pool, the others run on their own thread.
void check_callers() {
    std::vector<std::thread> callers;
    for (int c = 0; c < kCallers; ++c) {
        callers.emplace_back([c] {
            for (int round = 0; round < kRounds; ++round) check_call(kTotal, 1 + round % 7, 2 + (round + c) % 3, c);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

// While the pool is held, another thread's call runs on that thread alone; so does a call inside a call.
void check_serial_when_busy() {
    std::atomic<bool> held{false}, done{false};
    std::set<std::thread::id> others;
    std::thread holder([&] {
        qk::parallel_for(2, 1, qk::kPieceWork, 2, [&](int64_t, int64_t) {
            held.store(true);
            while (!done.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        });
    });
    while (!held.load()) std::this_thread::yield();
    qk::parallel_for(kTotal, 1, qk::kPieceWork, 4,
                     [&](int64_t, int64_t) { others.insert(std::this_thread::get_id()); });
    expect(others == std::set<std::thread::id>{std::this_thread::get_id()}, "a call beside a busy pool used it");
    done.store(true);
    holder.join();

    qk::parallel_for(4, 1, qk::kPieceWork, 2, [&](int64_t, int64_t) {
        std::set<std::thread::id> inside;
        qk::parallel_for(kTotal, 1, qk::kPieceWork, 4,
                         [&](int64_t, int64_t) { inside.insert(std::this_thread::get_id()); });
        expect(inside == std::set<std::thread::id>{std::this_thread::get_id()}, "a nested call left its thread");
    });
}

// The pool's threads do not exist in a child; it must neither wait for them nor start others.
void check_fork() {
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop.load()) check_call(kTotal, 1, 3, 0);
    });
    for (int round = 0; round < 10; ++round) {
        const pid_t child = fork();
        if (child == 0) {
            const int before = g_wrong.load();
            check_call(kTotal, 1, 3, round);
            _exit(g_wrong.load() == before ? 0 : 1);
        }
        int status = -1;
        expect(waitpid(child, &status, 0) == child && status == 0, "a forked child failed");
    }
    stop.store(true);
    busy.join();
}

}  // namespace

int main() {
    expect(std::string_view(qk::pool_name()) == "own", "an OpenMP runtime is in this process");
    check_sizes();
    check_callers();
    check_serial_when_busy();
    check_fork();
    check_callers();  // the parent goes on as before
    printf("qkern_threads: %s\n", g_wrong.load() == 0 ? "every result is right" : "wrong results");
    return g_wrong.load() == 0 ? 0 : 1;
}
