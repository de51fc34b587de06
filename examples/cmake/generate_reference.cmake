# SPDX-License-Identifier: MIT
# `generate` with temperature 0 writes the bytes that another framework wrote: the cases of MODEL/reference.json, each
# through another cache, on two threads.
cmake_minimum_required(VERSION 3.24)

set(caches contiguous/f32 chunked/f32 paged/f32)
file(READ "${MODEL}/reference.json" reference)
string(JSON num_cases LENGTH "${reference}" cases)
math(EXPR last "${num_cases} - 1")
foreach(index RANGE ${last})
  string(JSON prompt GET "${reference}" cases ${index} prompt)
  string(JSON greedy GET "${reference}" cases ${index} greedy_text)
  string(JSON num_tokens LENGTH "${reference}" cases ${index} greedy_ids)
  math(EXPR which "${index} % 3")
  list(GET caches ${which} cache)
  execute_process(
    COMMAND "${PROGRAM}" --model "${MODEL}" --prompt "${prompt}" --tokens ${num_tokens} --temperature 0
            --cache ${cache} --threads 2 --no-report
    OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "generate ended with ${result}\n${errors}")
  endif()
  if(NOT printed STREQUAL "${prompt}${greedy}\n")
    message(FATAL_ERROR "${cache}\n--- expected\n${prompt}${greedy}\n--- printed\n${printed}")
  endif()
endforeach()
