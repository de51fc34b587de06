# SPDX-License-Identifier: MIT
# cmake -DROOT=... -DWORK_DIR=<scratch folder> -DCOMPILER=<c++> "-DEIGEN_INCLUDES=-I..." -P check_snippets.cmake
# Every ```cpp block of README.md and docs/*.md compiles, behind what snippet_objects.hpp declares. Compiler messages name the
# page and its line.
cmake_minimum_required(VERSION 3.24)

# Blocks that are not compiled, by a text that only they have.
set(left_out
  "mpi_group group(MPI_COMM_WORLD)")  # needs MPI, and its rows are a comment

set(includes "#include \"${ROOT}/tests/structure/snippet_objects.hpp\"\n")
set(code "")
set(num_blocks 0)

# add_block(<page> <line> <text>)
function(add_block page line text)
  foreach(mark IN LISTS left_out)
    string(FIND "${text}" "${mark}" found)
    if(NOT found EQUAL -1)
      set_property(GLOBAL APPEND PROPERTY marks_found "${mark}")
      return()
    endif()
  endforeach()
  math(EXPR num_blocks "${num_blocks} + 1")
  # Includes go to the top; their lines stay, empty, so that the others keep their numbers.
  string(REGEX MATCHALL "#include [<\"][^>\"\n]*[>\"]" wanted "${text}")
  foreach(include IN LISTS wanted)
    string(APPEND includes "${include}\n")
  endforeach()
  string(REGEX REPLACE "#include [^\n]*" "" text "${text}")
  string(APPEND code "struct block_${num_blocks} : snippet_objects {\n  void run() {\n"
    "#line ${line} \"${page}\"\n" "${text}" "\n  }\n};\n")
  set(num_blocks ${num_blocks} PARENT_SCOPE)
  set(includes "${includes}" PARENT_SCOPE)
  set(code "${code}" PARENT_SCOPE)
endfunction()

file(GLOB pages "${ROOT}/docs/*.md")
foreach(page IN ITEMS "${ROOT}/README.md" LISTS pages)
  file(READ "${page}" rest)
  set(line 1)
  set(begin "\n```cpp\n")
  string(LENGTH "${begin}" begin_length)
  while(TRUE)
    string(FIND "${rest}" "${begin}" at)
    if(at EQUAL -1)
      break()
    endif()
    math(EXPR at "${at} + ${begin_length}")
    string(SUBSTRING "${rest}" 0 ${at} before)
    string(SUBSTRING "${rest}" ${at} -1 rest)
    string(REGEX REPLACE "[^\n]" "" before "${before}")
    string(LENGTH "${before}" newlines)
    math(EXPR line "${line} + ${newlines}")
    string(FIND "${rest}" "\n```\n" length)
    if(length EQUAL -1)
      message(FATAL_ERROR "${page}:${line}: this block has no end")
    endif()
    string(SUBSTRING "${rest}" 0 ${length} text)
    add_block("${page}" ${line} "${text}")
    string(SUBSTRING "${rest}" ${length} -1 rest)
    string(REGEX REPLACE "[^\n]" "" text "${text}")
    string(LENGTH "${text}" newlines)
    math(EXPR line "${line} + ${newlines}")
  endwhile()
endforeach()

get_property(marks_found GLOBAL PROPERTY marks_found)
foreach(mark IN LISTS left_out)
  if(NOT mark IN_LIST marks_found)
    message(FATAL_ERROR "check_snippets.cmake leaves out a block with '${mark}', and there is none")
  endif()
endforeach()
if(num_blocks LESS 5)
  message(FATAL_ERROR "only ${num_blocks} blocks were found in README.md and docs/")
endif()

file(WRITE "${WORK_DIR}/snippets.cpp" "${includes}" "${code}")
execute_process(
  COMMAND "${COMPILER}" -std=c++20 -fsyntax-only -w -DKVCACHE_SEPARATE_KERNELS -DKVCACHE_SEPARATE_CODECS "-I${ROOT}/include" ${EIGEN_INCLUDES}
          "${WORK_DIR}/snippets.cpp"
  RESULT_VARIABLE result ERROR_VARIABLE errors)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "code in README.md or docs/ does not compile:\n${errors}")
endif()
message(STATUS "${num_blocks} blocks compile")
