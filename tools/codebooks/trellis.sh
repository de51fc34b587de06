#!/bin/sh
# SPDX-License-Identifier: MIT
# Trains the tables of the codec trellis and writes include/kvcache/codec/trellis_tables.hpp: sh tools/codebooks/trellis.sh
# Takes a few minutes; needs a C++ compiler only. Other processors round floats elsewhere and may end at slightly other
# tables, and these are part of the format of stored caches: run it only to change that.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${CXX:-c++}" -std=c++20 -O3 -march=native -ffp-contract=off -I"$root/include" "$root/tools/codebooks/trellis.cpp" -o "$work/train"
"$work/train" >"$work/trellis_tables.hpp"
mv "$work/trellis_tables.hpp" "$root/include/kvcache/codec/trellis_tables.hpp"
