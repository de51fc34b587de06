#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what is missing, builds an example optimised and runs it. Without a name that is `generate`: the bundled model
# writes text through the cache, then once more through every cache. Arguments go on to the program:
#   sh examples/run.sh
#   sh examples/run.sh --prompt "ROMEO:" --tokens 400 --cache paged/f16
#   sh examples/run.sh compare_codecs --help
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"

kvcache_install g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev liblmdb-dev libhiredis-dev
kvcache_toolchain
program=generate
if [ "$#" -gt 0 ] && [ -e "$root/examples/$1.cpp" ]; then
  program=$1
  shift
fi
kvcache_targets=$program
kvcache_build examples -DCMAKE_BUILD_TYPE=Release "-DKVCACHE_WERROR=${CI:-OFF}" -DKVCACHE_BUILD_TESTS=OFF

run="$root/build/examples/examples/$program"
[ "$program" = generate ] || exec "$run" "$@"
"$run" "$@"
for argument in "$@"; do
  case $argument in --compare | -h | --help) exit 0 ;; esac
done
"$run" --compare "$@"
