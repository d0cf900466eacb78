#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to prove, in stages of at most nine minutes each:
#
#     bash bench/gpu.sh [build] [test] [sanitize] [bench]        (none named: all four)
#
# Needs no network: Python with torch, pybind11, scikit-build-core, pytest and hypothesis, nvcc, and for `sanitize`
# compute-sanitizer. Logs and records (JSON lines) go to $OUT, by default bench/results/gpu. The last lines
# are a short table. Without a GPU, `build` runs and `test` runs what the emulator and Triton's interpreter can.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results/gpu}
mkdir -p "$out"
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize bench)

build() {
    # Nothing is fetched: what qkern.ops and qkern.nn need is there already, gguf and llama-cpp-python are not.
    pip install --no-deps --no-build-isolation --force-reinstall \
        -C cmake.define.QKERN_CUDA=ON -C cmake.define.QKERN_WERROR=ON . 2>&1 | tee "$out/build.log" | tail -3
    (cd / && python - <<'PY'
import sys
import qkern.nn, qkern.ops
from qkern import _cuda
loaded = [name for name in ("gguf", "typer", "llama_cpp", "transformers") if name in sys.modules]
assert not loaded, f"qkern.ops and qkern.nn imported {loaded}"
print("kernels for", _cuda.ARCHITECTURES, "-", _cuda.probe() or "run here")
PY
    )
}

tests() {
    python -m pytest -q -p no:cacheprovider --timeout 300 -k "cuda or triton or gpu" tests/ops 2>&1 |
        tee "$out/test.log" | tail -5
}

sanitize() {
    local tool
    for tool in memcheck racecheck; do
        timeout 260 compute-sanitizer --tool "$tool" --error-exitcode 9 python -m pytest -q -x -p no:cacheprovider \
            -k cuda-gpu tests/ops/test_dequant_matmul.py tests/ops/test_dequantize_groupwise.py \
            tests/ops/test_pack_bits.py tests/ops/test_gptq_update.py 2>&1 | tee "$out/$tool.log" | tail -3
    done
}

bench() {
    python bench/bench_gpu.py --output "$out/dequant_matmul.jsonl" 2>&1 | tee "$out/bench.log"
}

for stage in "${stages[@]}"; do
    echo "== $stage"
    case $stage in
    build) build ;;
    test) tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    *)
        echo "unknown stage $stage: allowed are build, test, sanitize and bench" >&2
        exit 2
        ;;
    esac
done
