#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what is missing, builds the benchmarks optimised, runs them and writes build/bench/results/*.json and
# report.html. Arguments go on to every benchmark:
#   sh bench/run.sh
#   sh bench/run.sh --benchmark_filter=decode
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"

kvcache_install g++ cmake ninja-build libeigen3-dev libbenchmark-dev python3 liblmdb-dev libhiredis-dev \
  redis-server
kvcache_toolchain
kvcache_build bench -DCMAKE_BUILD_TYPE=Release "-DKVCACHE_WERROR=${CI:-OFF}" -DKVCACHE_BUILD_BENCH=ON \
  -DKVCACHE_BUILD_TESTS=OFF -DKVCACHE_BUILD_EXAMPLES=OFF

results="$root/build/bench/results"
rm -rf "$results"
mkdir -p "$results"
for bench in "$root"/build/bench/bench/*_bench; do
  name=$(basename "$bench")
  kvcache_say "running $name"
  "$bench" --benchmark_out="$results/$name.json" --benchmark_out_format=json "$@"
  # A filter that matches nothing leaves an empty file.
  [ -s "$results/$name.json" ] || rm -f "$results/$name.json"
done

set -- "$results"/*.json
[ -e "$1" ] || kvcache_fail "no benchmark ran, so there is nothing to report"
python3 -B "$root/bench/report.py" "$results/report.html" "$@"
kvcache_say "report: $results/report.html"
