# SPDX-License-Identifier: MIT
# FetchContent_MakeAvailable(kvcache).
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

build_and_run(fetched "-DKVCACHE_DIR=${kvcache_source}")
