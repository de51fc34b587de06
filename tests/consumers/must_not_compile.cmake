# SPDX-License-Identifier: MIT
# Misuse that the compiler catches, with a message that names the rule.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

set(compile "${compiler}" -std=c++20 -fsyntax-only "-I${kvcache_source}/include" ${eigen_includes})
expect_failure("block_codec" ${compile} "${sources}/fails_not_a_codec.cpp")
expect_failure("cache_layer" ${compile} "${sources}/fails_not_a_layer.cpp")
expect_failure("deleted" ${compile} "${sources}/fails_copied_cache.cpp")
