# SPDX-License-Identifier: MIT
# add_subdirectory(kvcache).
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

build_and_run(subproject "-DKVCACHE_DIR=${kvcache_source}")
