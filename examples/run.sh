#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what is missing, builds the examples optimised and lets the bundled model write text through the cache.
# Arguments go on to `generate`:
#   sh examples/run.sh
#   sh examples/run.sh --prompt "ROMEO:" --tokens 400 --cache paged/f16
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/setup.sh"

kvcache_install g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev
kvcache_toolchain
kvcache_build examples -DCMAKE_BUILD_TYPE=Release "-DKVCACHE_WERROR=${CI:-OFF}" -DKVCACHE_BUILD_TESTS=OFF

generate="$root/build/examples/examples/generate"
"$generate" "$@"
for argument in "$@"; do
  case $argument in --compare | -h | --help) exit 0 ;; esac
done
"$generate" --compare "$@"
