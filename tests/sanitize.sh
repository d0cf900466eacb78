#!/bin/sh
# Runs the native core under sanitizers: every kernel of every tier that this machine has, and the thread pool.
#
#   tests/sanitize.sh [BUILD_FOLDER]
#
# First addresses and undefined behaviour: the cases of tests/driver_cases.py (blobs with corrupt bytes among
# them) against the Python references. Then data races: the same cases, and callers, nesting and fork on our own
# pool in tests/cpp/threads.cpp (torch's OpenMP runtime is not instrumented, so it would be all false alarms).
# Installs nothing. It needs cmake, a compiler with the sanitizers, and a Python with qkern importable.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/sanitize}

# run NAME SANITIZERS: builds the drivers into a folder of that name and runs them.
run() {
    cmake -S "$root/tests/cpp" -B "$build/$1" -DCMAKE_BUILD_TYPE=Debug "-DQKERN_SANITIZE=$2" >/dev/null
    cmake --build "$build/$1" --parallel 2 --target qkern_driver qkern_threads
    "$build/$1/qkern_threads"
    "${PYTHON:-python3}" "$root/tests/driver_cases.py" "$build/$1/qkern_driver"
}

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1

run address address,undefined,float-cast-overflow
run thread thread
