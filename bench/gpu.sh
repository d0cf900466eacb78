#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to prove, in stages of at most nine minutes each:
#
#     bash bench/gpu.sh [build] [test] [sanitize] [bench]        (none named: all four, in this order)
#
# sanitize is memcheck and racecheck; these, initcheck and synccheck are stages of their own too. A stage that fails
# does not keep the next from running. Last come the table of goals and a line a stage; the status is 1 if one failed.
# Logs, records (JSON lines), tables and pictures go to $QKERN_BENCH_OUTPUT, by default bench/results/gpu.
#
# Needs no network: python3 (or $PYTHON) with torch, numpy, pybind11, scikit-build-core, cmake, ninja, pytest,
# pytest-timeout and hypothesis; nvcc; compute-sanitizer for its stages. Peers are optional wheels, or sources, in
# $QKERN_BENCH_WHEELS, by default wheelhouse, which git ignores; `build` installs them without what they depend on.
# Fetch them where there is a network:
#
#     pip download --no-deps -d wheelhouse humming-kernels            (0.6 MB; compiles its kernels when called)
#     pip download --no-deps --no-binary :all: -d wheelhouse gemlite  (0.2 MB; tunes itself for minutes)
#     pip download --no-deps -d wheelhouse bitsandbytes               (43 MB)
#
# $QKERN_COMMIT names the commit where there is no git. $QKERN_TEST_SECONDS (510), $QKERN_SANITIZE_SECONDS (230, of each
# tool) and $QKERN_BENCH_SECONDS (480) bound the stages, $QKERN_BENCH_OPTIONS go to bench_gpu.py. Without a GPU, `build`
# runs, `test` runs what the emulator and Triton's interpreter can, and the others say that they need one, and fail.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${QKERN_BENCH_OUTPUT:-bench/results/gpu}
out=$(mkdir -p "$out" && cd "$out" && pwd) || exit
wheels=${QKERN_BENCH_WHEELS:-wheelhouse}
python=${PYTHON:-python3}
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer; do
    [ -d "$folder" ] && PATH=$PATH:$folder
done
export PATH PYTHONUNBUFFERED=1
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
[[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || capability=

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null

has_gpu() {
    [ -n "$capability" ] && return
    echo "$1 needs a GPU: nvidia-smi names none"
    return 1
}

build() {
    # Hopper's own instructions need the a, which "native" leaves out. Without a GPU: what CMakeLists.txt says.
    local architectures=${capability/./}
    case $architectures in
    90) architectures=90a-real ;;
    ?*) architectures=$architectures-real ;;
    esac
    # Nothing is fetched: what qkern.ops and qkern.nn need is there, gguf, typer and llama-cpp-python are not.
    "$python" -m pip install --no-deps --no-build-isolation --no-index --force-reinstall --verbose \
        -C cmake.define.QKERN_CUDA=ON -C cmake.define.QKERN_CUDA_ARCHITECTURES="$architectures" . \
        >"$out/build.log" 2>&1 || {
        grep -E "error|Error|warning" "$out/build.log" | tail -20
        tail -5 "$out/build.log"
        return 1
    }
    grep -cE "warning[: ]" "$out/build.log" | sed 's/$/ warnings of compilers in build.log/'
    local files=()
    shopt -s nullglob
    files=("$wheels"/*.whl "$wheels"/*.tar.gz)
    shopt -u nullglob
    local file
    for file in "${files[@]}"; do
        "$python" -m pip install --no-deps --no-build-isolation --no-index "$file" >>"$out/wheels.log" 2>&1 ||
            echo "$file was not installed: wheels.log says why"
    done
    (cd / && "$python" - <<'PY'
import sys
import qkern.nn, qkern.ops
from qkern import _cuda
loaded = [name for name in ("gguf", "typer", "llama_cpp", "transformers") if name in sys.modules]
assert not loaded, f"qkern.ops and qkern.nn imported {loaded}"
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Python", sys.version.split()[0])
why = _cuda.probe()
print("kernels for", _cuda.ARCHITECTURES, "-", why or f"run here as those of sm_{_cuda.compiled_for()}")
# Clusters are taken from sm_90 on: what the runtime tells of a kernel's architecture has to be that.
hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
assert not hopper or _cuda.compiled_for() == 90
sys.exit(bool(why) and torch.cuda.is_available())
PY
    )
}

run_tests() {
    # With a GPU not the emulator: CI runs that. Several processes, because compiling Triton's kernels takes longer
    # than running them. GGUF has CPU kernels alone, and its tests need a package.
    local select="cuda or triton or gpu" workers=() limit=${QKERN_TEST_SECONDS:-510}
    if [ -n "$capability" ]; then
        select="cuda-gpu or triton or test_gpu"
        "$python" -c "import xdist" 2>/dev/null && workers=(-n 6)
    fi
    rm -f "$out/test.xml"
    timeout --foreground -s INT -k 20 "$limit" "$python" -m pytest -q -p no:cacheprovider -p no:benchmark --timeout 240 \
        "${workers[@]}" --continue-on-collection-errors --junitxml "$out/test.xml" -k "$select" \
        --ignore-glob "*/test_gguf_*" tests/ops >"$out/test.log" 2>&1
    local status=$?
    [ $status -eq 124 ] && echo "stopped after $limit s: not all tests ran"
    grep -E "^(FAILED|ERROR)" "$out/test.log" | cut -c1-200 | head -20
    tail -3 "$out/test.log"
    "$python" bench/gpu/count_tests.py "$out/test.xml" ${capability:+--gpu} || status=1
    return $status
}

sanitized() {
    local tool=$1 status=0 backend seconds log
    has_gpu "$tool" || return 1
    command -v compute-sanitizer >/dev/null || {
        echo "$tool needs compute-sanitizer, which is not on PATH nor in /usr/local/cuda"
        return 1
    }
    for backend in cuda triton; do
        seconds=$((${QKERN_SANITIZE_SECONDS:-230} / 3))
        [ $backend = cuda ] && seconds=$((2 * seconds))
        log=$out/$tool-$backend.log
        # A third of the time is for what is no case: to start under the tool, and to end.
        timeout -k 10 "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" bench/gpu/sanitize.py --backend $backend --seconds $((2 * seconds / 3)) >"$log" 2>&1 || status=1
        grep -E "wrong|no case|stopped|Error|^========= (Invalid|Uninit|Race|Warning|Barrier|ERROR SUM|RACECHECK SUM)" \
            "$log" | cut -c1-200 | sort | uniq -c | sort -rn | head -12
        grep -qE "^$backend: [1-9][0-9]* calls" "$log" || {
            echo "$tool of $backend did not come to its end; ${log##*/} ends with:"
            tail -3 "$log"
            status=1
        }
    done
    return $status
}

bench() {
    has_gpu bench || return 1
    # shellcheck disable=SC2086 # several options
    "$python" bench/bench_gpu.py --output "$out" --seconds "${QKERN_BENCH_SECONDS:-480}" ${QKERN_BENCH_OPTIONS:-} 2>&1 |
        tee "$out/bench.log"
}

[ $# -gt 0 ] || set -- build test sanitize bench
stages=()
for stage in "$@"; do
    case $stage in
    build | test | memcheck | racecheck | initcheck | synccheck | bench) stages+=("$stage") ;;
    sanitize) stages+=(memcheck racecheck) ;;
    *)
        echo "unknown stage $stage: allowed are build, test, sanitize and bench," \
            "memcheck, racecheck, initcheck and synccheck" >&2
        exit 2
        ;;
    esac
done
failed=0 summary=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    begin=$SECONDS
    case $stage in
    build) build ;;
    test) run_tests ;;
    bench) bench ;;
    *) sanitized "$stage" ;;
    esac
    status=$?
    [ $status -eq 0 ] || failed=1
    result=$([ $status -eq 0 ] && echo passed || echo "FAILED ($status)")
    summary+=("$(printf '%-10s %-14s %4d s' "$stage" "$result" $((SECONDS - begin)))")
done
echo "== stages, ${capability:+on a GPU of capability }${capability:-without a GPU}"
printf '%s\n' "${summary[@]}" | tee "$out/stages.txt"
exit $failed
