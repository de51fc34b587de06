#!/bin/sh
# SPDX-License-Identifier: MIT
# Lets libFuzzer run every target of tests/fuzz/ for a while, with address and undefined-behaviour sanitizers; ends with
# an error if one of them finds something. What it found lies in build/fuzz/.
#
#   sh tools/fuzz.sh                 ten minutes each
#   sh tools/fuzz.sh 60 snapshot     one minute of one target
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"
seconds=${1:-600}
[ $# -eq 0 ] || shift
kvcache_install clang libeigen3-dev nlohmann-json3-dev
command -v clang++ >/dev/null 2>&1 || kvcache_fail "clang++ is needed: libFuzzer comes with it"

mkdir -p "$root/build/fuzz"
cd "$root/build/fuzz"
flags="-std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
include="-I$root/include -I$root/tests -I$root/examples -idirafter /usr/include/eigen3 -DKVCACHE_SEPARATE_KERNELS"
# The kernels are no part of what is looked at, and slow to compile with all that.
kvcache_say "building the kernels"
# shellcheck disable=SC2086 # a list of options
clang++ -std=c++20 -O2 $include -c "$root/cmake/kernels.cpp" -o kernels.o
found=0
for source in "$root"/tests/fuzz/*_fuzz.cpp; do
  name=$(basename "$source" _fuzz.cpp)
  [ $# -eq 0 ] || case " $* " in *" $name "*) ;; *) continue ;; esac
  kvcache_say "building $name"
  # shellcheck disable=SC2086 # lists of options
  clang++ $flags $include "$source" kernels.o -o "$name"
  mkdir -p "corpus/$name" "found/$name"
  kvcache_say "running $name for $seconds seconds"
  # New inputs go into the first folder; those of the repository are read.
  if "./$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=512 -print_final_stats=1 \
    -artifact_prefix="found/$name/" "corpus/$name" "$root/tests/fuzz/corpus/$name" >"$name.log" 2>&1; then
    grep -E 'stat::number_of_executed_units|DONE' "$name.log" || true
  else
    found=1
    tail -n 40 "$name.log"
  fi
done
[ "$found" = 0 ] || kvcache_fail "something was found; see build/fuzz/found/"
