#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what is missing, builds and runs all tests; ends with ctest's summary. Arguments go on to ctest:
#   sh tests/run.sh
#   sh tests/run.sh -R cache
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"

kvcache_install g++ cmake ninja-build libeigen3-dev catch2 nlohmann-json3-dev libcli11-dev pkg-config \
  liblmdb-dev libhiredis-dev libzstd-dev redis-server libopenmpi-dev openmpi-bin
kvcache_toolchain

# Assertions on, those of the standard library too; optimised just enough for the tests to be quick: -O2 compiles half
# as long again, -Og a tenth less for tests that run a quarter longer. (A precompiled header of everything has 356 MB
# with g++ and costs each file a second more than it saves.)
kvcache_build tests -DCMAKE_BUILD_TYPE=Debug '-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1 -D_GLIBCXX_ASSERTIONS' \
  "-DKVCACHE_WERROR=${CI:-OFF}"

exec ctest --test-dir "$root/build/tests" --output-on-failure --no-tests=error -j "$(kvcache_jobs)" "$@"
