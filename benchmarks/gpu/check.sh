#!/usr/bin/env bash
# Everything that takes a GPU, in stages, in one call of less than ten minutes:
#
#   benchmarks/gpu/check.sh [--only STAGE,...] [--out FOLDER] [--device cuda|cpu] [--commit TEXT] [--validation NPZ]
#                           [--budget SECONDS] [-- MORE]
#
#   build       the package in place, without a network, for this GPU        rates       copies and products at best
#   parity      the tests of ops and lifter on the device                    capture     graphs, streams: the same bits
#   benchmarks  ours, by CUDA and by Triton, beside PyTorch's, with floors   accuracy    the bundled model in bfloat16
#   sanitizer   compute-sanitizer's memcheck and racecheck over every op
#
# Each stage writes STAGE.json into FOLDER ($OUT, or runs/gpu_check) as it goes; one that fails does not stop the
# others, but for the build: what was there before is not what the sources say. The exit status is 1 if any failed.
# Every stage has a share of the time, and what others leave: `--only` gives a stage all of it. PYTHON names the
# interpreter, else it is that of .venv where there is one. What comes after `--` goes to every stage; `record.py` lists
# it.
set -uo pipefail
cd "$(dirname "$0")/../.."

all=build,rates,parity,capture,benchmarks,sanitizer,accuracy
only=$all out=${OUT:-runs/gpu_check} device=cuda budget=570 common=()
if [ -x .venv/bin/python ]; then python=${PYTHON:-.venv/bin/python}; else python=${PYTHON:-python3}; fi

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit "$1"
}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage 0 ;;
        --) shift && break ;;
        --only | --out | --device | --budget | --commit | --validation)
            [ $# -ge 2 ] || usage 2 >&2
            case $1 in
                --only) only=$2 ;;
                --out) out=$2 ;;
                --device) device=$2 ;;
                --budget) budget=$2 ;;
                *) common+=("$1" "$2") ;;
            esac
            shift 2
            ;;
        *) echo "gpu_check: unknown argument $1" >&2 && usage 2 >&2 ;;
    esac
done
[[ $budget =~ ^[0-9]+$ ]] || { echo "gpu_check: --budget takes whole seconds, got '$budget'" >&2 && exit 2; }
IFS=, read -ra stages <<<"$only"
for stage in "${stages[@]}"; do
    [[ ,$all, = *,$stage,* ]] || { echo "gpu_check: unknown stage $stage, there are $all" >&2 && exit 2; }
done

# What is kept for a stage, in seconds; with all of them the budget.
share_of() {
    case $1 in
        build) echo 60 ;;
        parity) echo 130 ;;
        benchmarks) echo 220 ;;
        sanitizer) echo 110 ;;
        capture | accuracy) echo 20 ;;
        *) echo 10 ;;
    esac
}

mkdir -p "$out"
later=0
for stage in "${stages[@]}"; do
    later=$((later + $(share_of "$stage")))
    rm -f "$out/$stage.json"
done
for stage in "${stages[@]}"; do
    echo "== $stage"
    later=$((later - $(share_of "$stage")))
    limit=$((budget - SECONDS - later))
    if [ "$limit" -lt 5 ]; then
        echo "$stage: no time left"
        continue
    fi
    timeout --kill-after=10 "$limit" "$python" -m "benchmarks.gpu.$stage" --out "$out" --device "$device" --seconds "$limit" \
        "${common[@]}" "$@" 2>&1
    status=$?
    [ "$status" -eq 3 ] && break # there is no GPU
    [ "$stage" = build ] && [ "$status" -ne 0 ] && break
done
echo "== summary after $SECONDS s"
"$python" -m benchmarks.gpu.summary --out "$out" "${stages[@]}"
