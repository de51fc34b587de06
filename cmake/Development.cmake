# SPDX-License-Identifier: MIT
# What the project's own tests, examples and benchmarks are built with. Never seen by users of the library.

# Warnings. Dependencies are imported targets, so their headers count as system headers and stay silent.
add_library(kvcache_warnings INTERFACE)
target_compile_options(kvcache_warnings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wnon-virtual-dtor -Woverloaded-virtual -Wundef
  -Wno-missing-field-initializers  # designated initialisers leave the rest at its default by design
  $<$<CXX_COMPILER_ID:Clang,AppleClang>:-Wreserved-identifier;-Wno-sign-conversion>  # g++ keeps the latter out of -Wconversion; index_t is signed
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict>  # GCC bug 105651
  # Not true of aggregates that are destroyed half constructed, at -O3.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
  $<$<BOOL:${KVCACHE_WERROR}>:-Werror>)

set(CMAKE_CXX_EXTENSIONS OFF)

# Kernels and named codecs are compiled once, not in every program (kernel/select.hpp, interop/named_codecs.hpp).
add_library(kvcache_dev_parts STATIC "${CMAKE_CURRENT_LIST_DIR}/kernels.cpp" "${CMAKE_CURRENT_LIST_DIR}/codecs.cpp")
target_link_libraries(kvcache_dev_parts PRIVATE kvcache::kvcache kvcache_warnings)
# Checking sums of pointers takes clang as long as all other sanitizers together, in code that is all intrinsics.
set(kvcache_options_of_kernels $<$<CXX_COMPILER_ID:Clang,AppleClang>:-fno-sanitize=pointer-overflow>)
target_compile_options(kvcache_dev_parts PRIVATE ${kvcache_options_of_kernels})
target_compile_definitions(kvcache_dev_parts PUBLIC KVCACHE_SEPARATE_KERNELS KVCACHE_SEPARATE_CODECS)
if(KVCACHE_NATIVE)
  target_compile_options(kvcache_dev_parts PRIVATE -march=native)
endif()
add_library(kvcache_dev INTERFACE)
target_link_libraries(kvcache_dev INTERFACE kvcache_warnings kvcache_dev_parts)

if(PROJECT_IS_TOP_LEVEL)
  get_property(kvcache_multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
  if(NOT kvcache_multi_config AND NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
    message(STATUS "kvcache: no build type given, using Release")
  endif()
endif()

# kvcache_add_mpi_test(<name> <target> <processes> [<argument>...]): runs a program in so many processes on this machine.
function(kvcache_add_mpi_test name target processes)
  if(NOT MPIEXEC_EXECUTABLE)
    return()
  endif()
  # Open MPI refuses to start as root, or more processes than processors, unless told.
  execute_process(COMMAND "${MPIEXEC_EXECUTABLE}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  set(flags ${MPIEXEC_PREFLAGS})
  if(version MATCHES "Open ?MPI|OpenRTE")
    list(APPEND flags --allow-run-as-root --oversubscribe)
  endif()
  add_test(NAME ${name} COMMAND "${MPIEXEC_EXECUTABLE}" ${MPIEXEC_NUMPROC_FLAG} ${processes} ${flags}
    $<TARGET_FILE:${target}> ${ARGN} ${MPIEXEC_POSTFLAGS})
  # MPI's own leaks at exit are not ours to find; with more processes than processors, waiting ones should sleep.
  set_tests_properties(${name} PROPERTIES LABELS mpi TIMEOUT 300 PROCESSORS 2
    ENVIRONMENT "ASAN_OPTIONS=halt_on_error=1:detect_leaks=0")
endfunction()
