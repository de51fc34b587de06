# SPDX-License-Identifier: MIT
# Runs PROGRAM, with ARGUMENTS if there are any, and compares what it prints with the file EXPECTED, byte for byte.
cmake_minimum_required(VERSION 3.24)

execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${PROGRAM} ended with ${result}\n${errors}")
endif()
string(REPLACE "\r\n" "\n" printed "${printed}")
file(READ "${EXPECTED}" expected)
if(NOT printed STREQUAL expected)
  message(FATAL_ERROR "output differs from ${EXPECTED}\n--- expected\n${expected}--- printed\n${printed}")
endif()
