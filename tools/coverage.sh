#!/usr/bin/env bash
# Line coverage of diffupose/ and kernels/ by everything that CI runs: tools/coverage.sh [TREE [COMMAND ...]].
#
# COMMAND runs in TREE, a clone of any commit; the defaults are this clone and .ci/run. Every Python process that it starts
# in TREE/.venv is measured, tests' child processes and CI's lanes among them. What Triton compiles is not seen, what it
# interprets is. The report is printed, and lies in TREE/build/coverage.txt.
set -euo pipefail

tree=$(cd "${1:-$(dirname "$0")/..}" && pwd)
shift || true
[ $# -gt 0 ] || set -- .ci/run
cd "$tree"
make venv-dev
.venv/bin/python -m pip install --quiet coverage

folder=$(mktemp -d)
begin=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/measure_coverage.pth
trap 'rm -rf "$folder" "$begin"' EXIT
echo "import coverage; coverage.process_startup()" >"$begin"
cat >"$folder/settings" <<EOF
[run]
parallel = true
concurrency = thread, multiprocessing
data_file = $folder/data
include = $tree/diffupose/*, $tree/kernels/*, */lane-?/diffupose/*, */lane-?/kernels/*
[paths]
diffupose =
    $tree/diffupose
    */lane-?/diffupose
kernels =
    $tree/kernels
    */lane-?/kernels
EOF
status=0
COVERAGE_PROCESS_START=$folder/settings "$@" || status=$?

coverage() { .venv/bin/python -m coverage "$1" --rcfile="$folder/settings" "${@:2}"; }
mkdir -p build
coverage combine --quiet
{
    coverage report --precision=2
    echo "diffupose $(coverage report --precision=2 --format=total --include="$tree/diffupose/*") %"
    echo "kernels   $(coverage report --precision=2 --format=total --include="$tree/kernels/*") %"
} | tee build/coverage.txt
exit "$status"
