# SPDX-License-Identifier: MIT
# The containers compile without the include path of Eigen, and read none of its headers where it is in the default path.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

compile_and_run("-I${kvcache_source}/include" "${sources}/container_only.cpp")
execute_process(
  COMMAND "${compiler}" -std=c++20 "-I${kvcache_source}/include" -M "${sources}/container_only.cpp"
  OUTPUT_VARIABLE read COMMAND_ERROR_IS_FATAL ANY)
if(read MATCHES "[^ \n]*/Eigen/[^ \n]*")
  message(FATAL_ERROR "a container includes ${CMAKE_MATCH_0}")
endif()
