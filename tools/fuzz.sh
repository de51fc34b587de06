#!/bin/sh
# SPDX-License-Identifier: MIT
# Builds the fuzz targets with clang++, libFuzzer and the sanitizers, and runs each for a while, from its corpus in
# tests/fuzz/corpus/. What a run adds stays in build/fuzz/corpus/NAME; findings lie in build/fuzz/findings/NAME.
#   sh tools/fuzz.sh                     every target for 10 minutes
#   sh tools/fuzz.sh 60                  every target for 60 seconds
#   sh tools/fuzz.sh 60 llama2c          these targets for 60 seconds
# Ends with 1 if there was a finding: a crash, a sanitizer's report, an input slower than 10 s, one allocation of more
# than 16 MiB or more than 1 GiB in all (KVCACHE_FUZZ_MALLOC_MB, KVCACHE_FUZZ_RSS_MB). KVCACHE_JOBS: so many at once.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"

seconds=600
case ${1:-} in
  '' | *[!0-9]*) ;;
  *)
    seconds=$1
    shift
    ;;
esac
if [ "$#" -eq 0 ]; then
  for source in "$root"/tests/fuzz/*_fuzz.cpp; do
    set -- "$@" "$(basename "$source" _fuzz.cpp)"
  done
fi

kvcache_install clang cmake ninja-build libeigen3-dev catch2 nlohmann-json3-dev libcli11-dev
clang_major=$(clang++ -dM -E -x c++ /dev/null 2>/dev/null | sed -n 's/^#define __clang_major__ //p')
kvcache_install "libclang-rt-${clang_major:-14}-dev" # libFuzzer and the sanitizers, which clang only recommends
CXX=clang++
export CXX
kvcache_toolchain
kvcache_targets=''
for name in "$@"; do
  [ -e "$root/tests/fuzz/${name}_fuzz.cpp" ] || kvcache_fail "there is no tests/fuzz/${name}_fuzz.cpp"
  kvcache_targets="$kvcache_targets fuzz.$name"
done
kvcache_build fuzz -DKVCACHE_FUZZ=ON -DKVCACHE_BUILD_EXAMPLES=OFF -DCMAKE_VERIFY_INTERFACE_HEADER_SETS=OFF \
  -DCMAKE_BUILD_TYPE=Debug '-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g -D_GLIBCXX_ASSERTIONS'

# Runs one target; prints one line, and the whole log if there was a finding.
run_target() {
  name=$1
  corpus="$root/build/fuzz/corpus/$name"
  findings="$root/build/fuzz/findings/$name"
  log="$root/build/fuzz/$name.log"
  mkdir -p "$corpus" "$findings"
  dictionary="$root/tests/fuzz/dictionaries/$name.txt"
  set -- "-max_total_time=$seconds" -timeout=10 "-rss_limit_mb=${KVCACHE_FUZZ_RSS_MB:-1024}" \
    "-malloc_limit_mb=${KVCACHE_FUZZ_MALLOC_MB:-16}" -print_final_stats=1 "-artifact_prefix=$findings/"
  [ ! -e "$dictionary" ] || set -- "$@" "-dict=$dictionary"
  if TMPDIR="$scratch" "$root/build/fuzz/tests/fuzz/fuzz.$name" "$@" "$corpus" "$root/tests/fuzz/corpus/$name" \
    >"$log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    kvcache_say "$name: no finding in $seconds s, ${runs:-?} inputs"
  else
    cat "$log"
    kvcache_say "$name: a finding, see build/fuzz/findings/$name and build/fuzz/$name.log"
    : >"$findings/found"
  fi
}

# Targets write each input to a file: in memory that is several times as fast.
memory=${TMPDIR:-/tmp}
[ -n "${TMPDIR:-}" ] || [ ! -w /dev/shm ] || memory=/dev/shm
scratch=$(TMPDIR=$memory mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

rm -rf "$root/build/fuzz/findings"
mkdir -p "$root/build/fuzz/findings"
running=0
for name in "$@"; do
  run_target "$name" &
  running=$((running + 1))
  if [ "$running" -ge "$(kvcache_jobs)" ]; then
    wait
    running=0
  fi
done
wait
for name in "$@"; do
  [ ! -e "$root/build/fuzz/findings/$name/found" ] || exit 1
done
