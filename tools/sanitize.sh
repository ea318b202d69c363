#!/usr/bin/env bash
# Compile the engine with sanitizers and run it: addresses and undefined behaviour with OpenMP, data races with
# std::thread, since GCC's OpenMP runtime looks like races to ThreadSanitizer. All instruction sets of this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

cxx=${CXX:-c++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# As in setup.py: files named *_isa.cpp once per instruction set that the compiler knows.
declare -A isas=([portable]="")
x86="-mavx2 -mfma"
avx512="$x86 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
echo 'int main() { return 0; }' >"$folder/try.cpp"
try() { # name, flags
    if $cxx $2 "$folder/try.cpp" -o "$folder/try" 2>/dev/null; then isas[$1]=$2; fi
}
try avx2 "$x86"
try avx512 "$avx512"
try avx512_bf16 "$avx512 -mavx512bf16"
with=()
for isa in "${!isas[@]}"; do [ "$isa" = portable ] || with+=("-DDIFFUPOSE_WITH_${isa^^}"); done

sources=(tests/cpp/engine_sanitize.cpp csrc/common/isa.cpp csrc/engine/cpu/engine.cpp csrc/engine/cpu/kernels.cpp
    csrc/philox_normal/philox_normal_cpu.cpp)

run() { # name, flags...
    local name=$1 jobs=() source isa
    shift
    local flags=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer -Wall -Wextra -ffp-contract=off -I csrc "$@")
    mkdir "$folder/$name"
    for source in "${sources[@]}"; do
        $cxx "${flags[@]}" "${with[@]}" -c "$source" -o "$folder/$name/$(basename "$source").o" &
        jobs+=($!)
    done
    for isa in "${!isas[@]}"; do
        $cxx "${flags[@]}" -ffp-contract=fast ${isas[$isa]} "-DDIFFUPOSE_ISA=$isa" -c csrc/engine/cpu/kernels_isa.cpp \
            -o "$folder/$name/kernels.$isa.o" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    $cxx "${flags[@]}" "$folder/$name"/*.o -o "$folder/$name/run"
    echo "== $name"
    "$folder/$name/run"
}

export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
run address,undefined -fsanitize=address,undefined -fno-sanitize-recover=all -fopenmp
run thread -fsanitize=thread -DDIFFUPOSE_STD_THREADS -pthread -Wno-unknown-pragmas
