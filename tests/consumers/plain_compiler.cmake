# SPDX-License-Identifier: MIT
# A compiler and two -I. Both units of the second program include every header.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

set(includes "-I${kvcache_source}/include" ${eigen_includes})
compile_and_run(${includes} "${sources}/main.cpp")
compile_and_run(${includes} "${sources}/unit_a.cpp" "${sources}/unit_b.cpp")
