# SPDX-License-Identifier: MIT
# shellcheck shell=sh disable=SC2154 # root is set by who sources this
# What examples/run.sh, tests/run.sh, bench/run.sh and .ci/run share. Sourced, with `root` set to the repository.
#
#   kvcache_install PACKAGE...        installs what is missing of these Debian packages
#   kvcache_toolchain                 checks the compiler and CMake, or says what is needed and stops
#   kvcache_build NAME OPTION...      configures build/NAME with these CMake options when needed, and builds it, or of it
#                                     the targets in the variable kvcache_targets
#
# Environment: CXX, CXXFLAGS and CMAKE_PREFIX_PATH as CMake understands them; KVCACHE_JOBS (default: processors);
# KVCACHE_CMAKE_ARGS (further CMake options); KVCACHE_SETUP=0 (install nothing); CI=true (warnings are errors).

kvcache_say() { printf '== %s\n' "$*"; }

kvcache_fail() {
  printf '== %s\n' "$*" >&2
  exit 1
}

kvcache_jobs() { printf '%s' "${KVCACHE_JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)}"; }

kvcache_has_header() {
  for dir in /usr/include /usr/local/include /opt/homebrew/include; do
    [ -e "$dir/$1" ] && return 0
  done
  return 1
}

# Is what this Debian package brings there already, from wherever it came?
kvcache_present() {
  case $1 in
    g++) command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ;;
    ninja-build) command -v ninja >/dev/null 2>&1 || command -v ninja-build >/dev/null 2>&1 ;;
    clang) command -v clang++ >/dev/null 2>&1 ;;
    g++-aarch64-linux-gnu) command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 ;;
    qemu-user-static) command -v qemu-aarch64-static >/dev/null 2>&1 ;;
    libeigen3-dev) kvcache_has_header eigen3/Eigen/Core || kvcache_has_header Eigen/Core ;;
    catch2) kvcache_has_header catch2/catch.hpp || kvcache_has_header catch2/catch_test_macros.hpp ;;
    libbenchmark-dev) kvcache_has_header benchmark/benchmark.h ;;
    nlohmann-json3-dev) kvcache_has_header nlohmann/json.hpp ;;
    libcli11-dev) kvcache_has_header CLI/CLI.hpp ;;
    openmpi-bin) command -v mpirun >/dev/null 2>&1 ;;
    liblmdb-dev) kvcache_has_header lmdb.h ;;
    libhiredis-dev) kvcache_has_header hiredis/hiredis.h ;;
    libzstd-dev) kvcache_has_header zstd.h ;;

    lib*) command -v dpkg-query >/dev/null 2>&1 &&
      [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
  esac
}

# Sets `missing` to those of the packages that are not there.
kvcache_find_missing() {
  missing=''
  for package in "$@"; do
    kvcache_present "$package" || missing="$missing $package"
  done
}

# Installs what is missing. A package that cannot be had is named and is no error here: CMake may find the
# library elsewhere or download it, and kvcache_toolchain stops for the tools that nothing works without.
kvcache_install() {
  kvcache_find_missing "$@"
  [ -n "$missing" ] || return 0
  if [ "${KVCACHE_SETUP:-1}" = 0 ]; then
    kvcache_say "not installed, and KVCACHE_SETUP=0:$missing"
    return 0
  fi
  if ! command -v apt-get >/dev/null 2>&1; then
    kvcache_say "not found:$missing (names of the Debian packages). This system has no apt-get:"
    kvcache_say "install them with its package manager. Going on with what is there."
    return 0
  fi
  if [ "$(id -u)" = 0 ]; then
    as_root=''
  elif command -v sudo >/dev/null 2>&1; then
    as_root='sudo'
  else
    kvcache_say "please run as root: apt-get install$missing. Going on with what is there."
    return 0
  fi

  kvcache_say "installing with apt:$missing"
  mkdir -p "$root/build"
  log="$root/build/apt.log"
  apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300"
  $apt update >"$log" 2>&1 || kvcache_say "apt-get update failed, see build/apt.log; trying with the lists that are there"
  # shellcheck disable=SC2086 # both are lists of words
  if ! $apt install --no-install-recommends $missing >>"$log" 2>&1; then
    # One package that this release lacks must not keep the others away.
    for package in $missing; do
      $apt install --no-install-recommends "$package" >>"$log" 2>&1 || true
    done
  fi
  kvcache_find_missing "$@"
  [ -z "$missing" ] || kvcache_say "could not be installed:$missing (see build/apt.log). Going on with what is there."
}

# kvcache_at_least 3.25.1 3.24: is the first version at least the second?
kvcache_at_least() {
  [ "$(printf '%s\n%s\n' "$2" "$1" | sort -t . -k 1,1n -k 2,2n | head -n 1)" = "$2" ]
}

kvcache_toolchain() {
  command -v cmake >/dev/null 2>&1 || kvcache_fail "CMake 3.24 or newer is needed (Debian, Ubuntu: apt install cmake)"
  cmake_version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
  kvcache_at_least "$cmake_version" 3.24 ||
    kvcache_fail "CMake 3.24 or newer is needed, this is $cmake_version. Debian 12 and Ubuntu 24.04 bring it;" \
      "elsewhere: python3 -m pip install cmake, or https://cmake.org/download"

  # Without a wish in CXX: the system's compiler, or a newer g++ beside it.
  if [ -z "${CXX:-}" ]; then
    for compiler in c++ g++ g++-15 g++-14 g++-13 g++-12 clang++; do
      if command -v "$compiler" >/dev/null 2>&1 && kvcache_new_enough "$compiler"; then
        case $compiler in c++) ;; *) CXX=$compiler && export CXX ;; esac
        return 0
      fi
    done
    kvcache_fail "a C++20 compiler is needed: g++ 12 or clang++ 14, or newer (Debian, Ubuntu: apt install g++-12)." \
      "Here: $(c++ --version 2>/dev/null | head -n 1 || true)"
  fi
  kvcache_new_enough "$CXX" || kvcache_fail "CXX=$CXX is not g++ 12 or clang++ 14, or newer"
}

kvcache_new_enough() {
  macros=$("$1" -dM -E -x c++ /dev/null 2>/dev/null) || return 1
  major=$(printf '%s\n' "$macros" | sed -n 's/^#define __clang_major__ //p')
  if [ -n "$major" ]; then
    [ "$major" -ge 14 ]
  else
    major=$(printf '%s\n' "$macros" | sed -n 's/^#define __GNUC__ //p')
    [ -n "$major" ] && [ "$major" -ge 12 ]
  fi
}

# Configures only when the options, the tools or the place of the repository changed; the build tool notices the rest.
kvcache_build() {
  name=$1
  shift
  build="$root/build/$name"
  if command -v ccache >/dev/null 2>&1; then set -- "$@" -DCMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
  if command -v ninja >/dev/null 2>&1; then set -- -G Ninja "$@"; fi
  # shellcheck disable=SC2086 # a list of options
  set -- "$@" ${KVCACHE_CMAKE_ARGS:-}
  wanted="$root ${CXX:-} ${CXXFLAGS:-} ${CMAKE_PREFIX_PATH:-} $*"
  stamp="$build/configured-with"
  if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    kvcache_say "configuring build/$name"
    rm -rf "$build"
    mkdir -p "$build"
    cmake -S "$root" -B "$build" "$@" >"$build/configure.log" 2>&1 || {
      cat "$build/configure.log"
      kvcache_fail "configuring failed"
    }
    printf '%s' "$wanted" >"$stamp"
  fi
  kvcache_say "building build/$name"
  # shellcheck disable=SC2086 # a list of targets
  cmake --build "$build" --parallel "$(kvcache_jobs)" ${kvcache_targets:+--target $kvcache_targets}
}
