#!/bin/sh
# Cross-compiles the native core for Arm and runs its kernels under QEMU against the Python references.
#
#   tests/neon.sh [BUILD_FOLDER]
#
# Tiers: neon (armv8-a baseline) and neon_dotprod (armv8.2-a with dotprod and fp16). Installs nothing. It needs
# Debian's g++-aarch64-linux-gnu and qemu-user-static, cmake, and a Python with qkern importable.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/neon}

for tool in aarch64-linux-gnu-g++ qemu-aarch64-static cmake; do
    if ! command -v "$tool" >/dev/null; then
        echo "neon.sh: $tool is missing; install g++-aarch64-linux-gnu, qemu-user-static and cmake" >&2
        exit 1
    fi
done

cmake -S "$root/tests/cpp" -B "$build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
cmake --build "$build" --parallel 2 --target qkern_driver
exec "${PYTHON:-python3}" "$root/tests/driver_cases.py" \
    qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu "$build/qkern_driver"
