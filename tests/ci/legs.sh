#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# One leg of .ci/run by its name: bash tests/ci/legs.sh sanitizers
# Each leg says why it is there. Exit code 77: a tool is missing, the leg is skipped.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
# shellcheck source=tools/setup.sh
. tools/setup.sh
CMAKE_BUILD_PARALLEL_LEVEL=$(kvcache_jobs)
CTEST_PARALLEL_LEVEL=$(kvcache_jobs)
export CMAKE_BUILD_PARALLEL_LEVEL CTEST_PARALLEL_LEVEL
if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi

need() {
  command -v "$1" >/dev/null || {
    echo "skipped: $1 is not installed"
    exit 77
  }
}

# The whole job has an hour. On a slow machine the legs that come last, and say the least that is new, stay out once most of it is
# gone; they run by themselves all the same.
in_time() {
  local now used
  now=$(date +%s)
  used=$((now - ${KVCACHE_CI_STARTED:-now}))
  [ "$used" -lt 2800 ] || {
    echo "skipped: $used s of an hour are used; bash tests/ci/legs.sh $1 runs it"
    exit 77
  }
}

# Tracked and new files, or everything where this is no git checkout.
sources() {
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard -- "$@"
  else
    local names=()
    for pattern in "$@"; do names+=(-o -path "./$pattern"); done
    find . -path ./build -prune -o -type f \( "${names[@]:1}" \) -print
  fi
}

# What `sh tests/run.sh` returned at the start of this run: g++, the library's and the standard library's assertions
# on (-D_GLIBCXX_ASSERTIONS), every header on its own, consumers.
leg_tests() { [ "${KVCACHE_CI_TESTS:?set by .ci/run}" = 0 ]; }

# One format, so that diffs show changes only.
leg_format() {
  need clang-format
  clang-format --version
  sources '*.hpp' '*.inl' '*.cpp' | xargs clang-format --dry-run --Werror
}

# The scripts are POSIX sh and run on machines where /bin/sh is not bash.
leg_shell() {
  need shellcheck
  shellcheck -x tools/setup.sh tools/codebooks/trellis.sh tools/fuzz.sh tests/run.sh examples/run.sh bench/run.sh .ci/run tests/ci/legs.sh
}

# What computes, fully optimised and without assertions, in build/<folder> by <compiler>: kernels, codecs, attention, and
# further tests by name.
optimised_with() {
  local folder=$1 compiler=$2
  shift 2
  cmake -S . -B "build/$folder" -G Ninja "-DCMAKE_CXX_COMPILER=$compiler" -DCMAKE_BUILD_TYPE=Release -DKVCACHE_BUILD_EXAMPLES=OFF \
    -DKVCACHE_WERROR=ON -DCMAKE_VERIFY_INTERFACE_HEADER_SETS=OFF >/dev/null
  local tests=(codec.exact codec.int8 codec.low_bit_codecs codec.centred codec.stored_bytes
    attention.adversarial attention.attend_sizes attention.determinism attention.golden
    attention.bytes_on_tiles store.crc32c "$@")
  local source
  for source in tests/kernel/*_test.cpp; do tests+=("kernel.$(basename "$source" _test.cpp)"); done
  cmake --build "build/$folder" --target "${tests[@]}"
  # A test runs under its name, or under that and a level: name@avx2.
  local names
  names=$(printf '|%s' "${tests[@]//./[.]}")
  ctest --test-dir "build/$folder" --output-on-failure --no-tests=error -R "^(${names:1})(@|$)"
}

# The other compiler: its vectoriser moves and merges vector code in ways of its own. Everything else goes through it,
# warnings are errors, in the leg `sanitizers`.
leg_clang() {
  need clang++
  in_time clang
  optimised_with clang-optimised clang++
}

# What users get: g++, which at -O1 does not do what it does here.
leg_optimised() {
  in_time optimised
  optimised_with optimised g++ cache.sealing store.snapshot
  if [ "$(uname -m)" != x86_64 ] || ! command -v qemu-x86_64-static >/dev/null; then return 0; fi
  # Processors without AVX, and without AVX-512, emulated: what slipped in of a higher level is an illegal instruction there.
  local cpu
  for cpu in Nehalem Haswell; do
    echo "attention.adversarial and store.crc32c on $cpu"
    qemu-x86_64-static -cpu "$cpu" build/optimised/tests/attention/attention.adversarial
    qemu-x86_64-static -cpu "$cpu" build/optimised/tests/store.crc32c
  done
}

# Mistakes a compiler sees but does not call warnings; over programs that instantiate most of the library.
leg_tidy() {
  need clang-tidy
  need clang++
  in_time tidy
  cmake -S . -B build/tidy -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=Debug -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
  sources cmake/codecs.cpp examples/0{1,2,5,7}_*.cpp examples/10_*.cpp examples/{split_attention,serve_many,compare_codecs}.cpp tests/conformance/any_cache_test.cpp 'tests/interop/*_test.cpp' |
    xargs -P "$(kvcache_jobs)" -n 1 clang-tidy -p build/tidy --quiet
}

# The kernels for ARM: what computes on blocks, cross-compiled and run in an emulator. What looks at bits runs on the portable
# kernels as well, which this compiler contracts to fused multiply-adds; what multiplies bytes also on a processor
# without dot products, where they are floats.
leg_neon() {
  need aarch64-linux-gnu-g++
  in_time neon
  need qemu-aarch64-static
  if [ ! -e /usr/include/catch2/catch.hpp ]; then
    echo "skipped: only the header-only Catch2 2 can be cross-compiled without a build of its own"
    exit 77
  fi
  mkdir -p build/neon
  local flags=(-std=c++20 -O1 -Wall -Wextra -Wshadow -Wconversion -Werror -static -Iinclude -Itests -DKVCACHE_SEPARATE_KERNELS -DKVCACHE_SEPARATE_CODECS
    -idirafter /usr/include -idirafter /usr/include/eigen3
    "-DKVCACHE_TESTS_DIR=\"$root/tests\"" "-DKVCACHE_SOURCE_DIR=\"$root\"")
  local part
  for part in tests/support/main cmake/kernels cmake/codecs; do
    aarch64-linux-gnu-g++ "${flags[@]}" -c "$part.cpp" -o "build/neon/$(basename "$part").o"
  done
  # shellcheck disable=SC2016 # expanded by the inner shell
  printf '%s\n' tests/core/half_test.cpp tests/store/crc32c_test.cpp tests/kernel/*_test.cpp \
    tests/codec/{exact,int8,low_bit_codecs,stored_bytes}_test.cpp \
    tests/attention/{adversarial,attend,attend_sizes,determinism,golden}_test.cpp \
    tests/conformance/verbs_test.cpp |
    xargs -P "$(kvcache_jobs)" -I '{}' bash -euc '
      source=$1 name=build/neon/$(basename "$1" .cpp); shift
      aarch64-linux-gnu-g++ "$@" "$source" build/neon/{main,kernels,codecs}.o -o "$name"
      echo "$name on neon"
      KVCACHE_ISA=neon qemu-aarch64-static -cpu max "$name"
      case $source in
        tests/kernel/* | */int8_test.cpp | */low_bit_codecs_test.cpp | */stored_bytes_test.cpp | */golden_test.cpp)
          echo "$name on portable"
          KVCACHE_ISA=portable qemu-aarch64-static -cpu max "$name"
          ;;
      esac
      case ${name##*/} in
        bytes_test | int8_test | low_bit_codecs_test)
          echo "$name on neon without dot products"
          KVCACHE_ISA=neon qemu-aarch64-static -cpu cortex-a53 "$name"
          ;;
      esac' compile '{}' "${flags[@]}"
}

# Address and undefined-behaviour sanitizers: raw memory, index arithmetic, lifetimes of forks, malformed files. The
# tests cover what the examples are made of, so the programs themselves, slow to compile, stay out; so do the whole
# model, tiles that are emulated by plain arrays, what is compiled a second time to see the same bytes, and attention once
# more on AVX2, whose kernels tests/kernel has here as well.
# Null and short objects are left to the address sanitizer (CMakePresets.json): it sees the access, and checks before
# every access take a sixth of the compiler's time.
leg_sanitizers() {
  need clang++
  cmake --preset clang-debug -DKVCACHE_BUILD_EXAMPLES=OFF \
    '-DKVCACHE_SKIP_TESTS=^attention[.]bytes_on_tiles$|^codec[.]stored_bytes_fused$|^examples[.](model|model_threads|quality|stories260k)$'
  cmake --build --preset clang-debug
  ctest --preset clang-debug -LE 'consumers|emulated_tiles' -E '^(attention|conformance)[.].*@avx2$|^conformance[.]every_codec@portable$'
}

# Thread sanitizer over the tests that use an executor with threads.
leg_threads() { cmake --workflow --preset gcc-tsan; }

# The main job as a user starts it.
leg_examples() { sh examples/run.sh --tokens 64; }

# The benchmarks build, run and end in a report: a few rows only, whose figures mean nothing.
leg_bench() { KVCACHE_BENCH_RING_MIB=4 KVCACHE_BENCH_STORE_MIB=8 sh bench/run.sh --benchmark_min_time=0.001 --benchmark_filter='kv_len:512|tokens:1/|blocks:1000/'; }

"leg_$1"
