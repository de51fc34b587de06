# SPDX-License-Identifier: MIT
# cmake -DSOURCE_DIR=... -DOUTPUT=... -P write_commit.cmake: a header with the commit, touched only when it
# changes.
cmake_minimum_required(VERSION 3.24)
set(commit "")
find_program(git git)
if(git AND EXISTS "${SOURCE_DIR}/.git")
  execute_process(COMMAND "${git}" describe --always --dirty --abbrev=10
    WORKING_DIRECTORY "${SOURCE_DIR}" OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
file(CONFIGURE OUTPUT "${OUTPUT}" CONTENT "#define KVCACHE_BENCH_COMMIT \"@commit@\"\n" @ONLY)
