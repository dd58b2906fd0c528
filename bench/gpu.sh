#!/usr/bin/env bash
# Runs all GPU tests and benchmarks of this project, in stages of at most ten minutes. Finished stages are skipped:
#
#     bash bench/gpu.sh OUT [STAGE ...]       # by default all stages; run it again after an interruption or a failure
#
# It writes OUT/STAGE.log, OUT/STAGE.done, results as JSON and text, and OUT/summary.txt. Without a GPU it makes a dry run of tiny stages.
# WHEELS=FOLDER: wheels of the packages in bench/gpu-wheels.txt, for a machine without network. Missing packages are skipped and reported.
# DATA=FOLDER: a converted data set of photographs for the loading stage. PYTHON: by default python3. PREFIX=FOLDER: where to unpack the wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) && shift
ALL=(environment tests_match tests_fuse tests_rest tests_training launches memcheck racecheck initcheck counters bench_match bench_fusion bench_modules report
    profile_demo profile_paper profile_release loading train_msf_0 train_none_0 train_msf_1 train_none_1)
[ $# -gt 0 ] || set -- "${ALL[@]}"
for stage; do
    case " ${ALL[*]} " in *" $stage "*) ;; *) echo "unknown stage $stage; the stages are ${ALL[*]}"; exit 2 ;; esac
done
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-590} # seconds per stage

if [ -n "${WHEELS:-}" ]; then
    PREFIX=${PREFIX:-${TMPDIR:-/tmp}/msf_fast-wheels}
    # The machine's own packages come first, so a wheel never replaces its PyTorch.
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$PREFIX" $(basename -s .whl -a "$WHEELS"/*.whl | cut -d- -f1) || exit 2
    export PYTHONPATH="$PWD:$PREFIX${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

run() { timeout --signal INT --kill-after 30 "$LIMIT" "$@"; }
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
QUICK= && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || QUICK=--quick
[ -z "$QUICK" ] || echo "no GPU: this is a dry run, and its figures mean nothing"
has xdist && WORKERS="-n ${WORKERS:-$(nproc)}" || WORKERS=
has lmdb && TRAINS=1 || TRAINS=
has nvidia.dali && BACKEND=dali || BACKEND=torch

# --- The stages. A stage may find its earlier results in OUT.

environment() {
    nvidia-smi 2>/dev/null
    "$PYTHON" - <<'PY' | tee "$OUT/environment.json"
import importlib.util, json
from bench.measure import environment
wanted = {"lmdb": "data, training", "msgpack": "data, training", "nvidia.dali": "GPU decoding (the torch loader replaces it)", "diffusers": "SlotDiffusion",
          "timm": "frozen backbones", "tyro": "commands", "vector_quantize_pytorch": "a baseline", "flash_kmeans": "a baseline", "flashlib": "a baseline"}
def missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ImportError:
        return True
print(json.dumps({**environment(), "missing": {name: use for name, use in wanted.items() if missing(name)}}, indent=2))
PY
}

# The tests marked gpu: all precisions, dtypes and odd sizes, opcheck, fullgraph, CUDA graphs, determinism.
# Most of their time is the compiler's, which the cores share.
tests() { run "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider $WORKERS --junitxml "$OUT/tests-$1.xml" "${@:2}"; }
tests_match() { tests match tests/kernels/test_match.py tests/kernels/test_exactness.py tests/kernels/test_lookup.py; }
tests_fuse() { tests fuse tests/kernels/test_fuse.py; }
tests_rest() { tests rest tests/kernels/test_registration.py tests/kernels/test_slot_attention_step.py tests/kernels/test_specialization.py tests/test_metrics.py; }
tests_training() { needs_training && tests training tests/engine/test_gpu.py; }

sanitize() {
    local tool=$1 checker
    checker=(compute-sanitizer --tool "$tool" --kernel-name kns=_kernel --error-exitcode 9 --print-limit 20)
    if ! command -v compute-sanitizer >/dev/null || [ -n "$QUICK" ]; then
        [ -n "$QUICK" ] || { echo "compute-sanitizer is missing"; return 1; }
        checker=()
    fi
    # Without the caching allocator each tensor is its own allocation, so the tool sees where it ends.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checker[@]}" "$PYTHON" -m bench.launches $QUICK
}
launches() { run "$PYTHON" -m bench.launches $QUICK; } # compiles the kernels first, as compiling under the sanitizer takes too long
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
initcheck() { sanitize initcheck; }

# The hardware's counters of each kernel: instructions, bytes, stalls, occupancy.
counters() {
    if ! command -v ncu >/dev/null || [ -n "$QUICK" ]; then
        [ -n "$QUICK" ] || { echo "ncu is missing"; return 1; }
        return 77
    fi
    local names
    names=$("$PYTHON" -c "from msf_fast.kernels.shipped import kernel_names; print('|'.join(kernel_names()))") || return
    run ncu --profile-from-start off --clock-control none --kernel-name "regex:^($names)$" --set full --force-overwrite -o "$OUT/counters" \
        "$PYTHON" -m bench.launches --counters || return
    ncu --import "$OUT/counters.ncu-rep" --page raw --csv >"$OUT/counters.csv"
}

bench() { run "$PYTHON" -m pytest -q -p no:cacheprovider "bench/test_$1.py" $QUICK --benchmark-json "$OUT/bench-$1.json" >"$OUT/bench-$1.txt" || { tail -n 40 "$OUT/bench-$1.txt"; return 1; }; }
bench_match() { bench match; }
bench_fusion() { bench fusion; }
bench_modules() { bench modules; }
report() { run "$PYTHON" -m bench.summary "$OUT"/bench-*.json --out "$OUT/report"; }

profile() { needs_training && run "$PYTHON" -m bench.profile --preset "$1" $QUICK --out "$OUT/profile-$1"; } # limits, shares of floors, the parts of a step
profile_demo() { profile demo; }
profile_paper() { profile paper; }
profile_release() { profile release; }

loading() { needs_training && run "$PYTHON" -m bench.loading ${DATA:+--data "$DATA"} $QUICK --json "$OUT/loader.json"; }

# SLATE-MSF and SLATE on shapes with the same seeds, in pieces: SIGINT saves and stops, the next call resumes.
train() {
    needs_training || return
    local name=$1 && shift
    local folder=$OUT/train/$name
    local pieces=(--preset paper --encoder.backbone cnn --encoder.cnn-stride 4 --data shapes --run-dir "$folder" --loading.backend "$BACKEND")
    [ -z "$QUICK" ] || pieces=(--preset demo --image-size 32 --batch-size 4 --autoencoder-steps 2 --steps 2 --log.validations 1 --run-dir "$folder")
    [ ! -e "$folder/config.yaml" ] || pieces=(--resume --run-dir "$folder")
    timeout --signal INT --kill-after 60 "$LIMIT" "$PYTHON" -m train.slate_msf "${pieces[@]}" "$@"
    [ -e "$folder/evaluation.json" ] # otherwise the run is not finished; call the stage again
}
train_msf_0() { train msf-0 --seed 0; }
train_none_0() { train none-0 --seed 0 --fusion none; }
train_msf_1() { train msf-1 --seed 1; }
train_none_1() { train none-1 --seed 1 --fusion none; }

needs_training() { [ -n "$TRAINS" ] || { echo "skipped: lmdb is missing"; return 77; }; }

# --- The driver.

failed=0
for stage; do
    if [ -e "$OUT/$stage.done" ]; then
        state="done before"
    else
        start=$SECONDS
        "$stage" >"$OUT/$stage.log" 2>&1
        code=$?
        case $code in
        0) state=done && touch "$OUT/$stage.done" ;;
        77) state="skipped" ;;
        *) state="failed ($code)" && failed=1 ;;
        esac
        state+=", $((SECONDS - start)) s: $(tail -n 1 "$OUT/$stage.log" | tr -d '\r' | cut -c1-160)"
    fi
    printf '%-16s %s\n' "$stage" "$state" | tee -a "$OUT/summary.txt"
done
exit $failed
