# SPDX-License-Identifier: MIT
# Steps the consumer scripts are made of. Every script is run with
#   cmake -DSETTINGS=<file that CMakeLists.txt wrote> -DWORK_DIR=<own scratch folder> -P <script>
cmake_minimum_required(VERSION 3.24)
include("${SETTINGS}")
set(sources "${CMAKE_CURRENT_LIST_DIR}/sources")

# run(<command> <argument>...): stops with the output if the command fails.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed (${result}): ${command}\n${output}")
  endif()
endfunction()

# expect_failure(<pattern> <command> <argument>...): the command fails, and its output matches the pattern.
function(expect_failure pattern)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  list(JOIN ARGN " " command)
  if(result EQUAL 0)
    message(FATAL_ERROR "succeeded, but must not: ${command}")
  elseif(NOT output MATCHES "${pattern}")
    message(FATAL_ERROR "failed as it should, but without '${pattern}': ${command}\n${output}")
  endif()
endfunction()

# configure(<source folder> <build folder> <option>...)
function(configure source build)
  run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" ${configure_options} ${ARGN})
endfunction()

# build_and_run(<project> <option>...): configures and builds the project, and runs its `consumer`.
function(build_and_run project)
  configure("${CMAKE_CURRENT_LIST_DIR}/${project}" "${WORK_DIR}/build" ${ARGN})
  run("${CMAKE_COMMAND}" --build "${WORK_DIR}/build" --config "${build_type}")
  find_program(consumer NAMES consumer PATHS "${WORK_DIR}/build" PATH_SUFFIXES "${build_type}"
               REQUIRED NO_CACHE NO_DEFAULT_PATH)
  run("${consumer}")
endfunction()

# install_kvcache(<prefix>): installs, then moves the tree, since what is installed must not depend on its place.
function(install_kvcache prefix)
  run("${CMAKE_COMMAND}" --install "${kvcache_build}" --config "${build_type}" --component kvcache
      --prefix "${prefix}-first")
  file(REMOVE_RECURSE "${prefix}")
  file(RENAME "${prefix}-first" "${prefix}")
endfunction()

# compile_and_run(<compiler argument>...): the plainest of all, without any build system.
function(compile_and_run)
  run("${compiler}" -std=c++20 -Wall -Wextra -Werror ${ARGN} -o "${WORK_DIR}/consumer")
  run("${WORK_DIR}/consumer")
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")
