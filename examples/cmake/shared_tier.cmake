# SPDX-License-Identifier: MIT
# cmake -DPROGRAM=... -DSCRATCH=<folder> -DTIERS=directory,lmdb,redis -P shared_tier.cmake
# The second process finds what the first one put; without a server it goes on without.
cmake_minimum_required(VERSION 3.24)
string(REPLACE "," ";" tiers "${TIERS}")
file(REMOVE_RECURSE "${SCRATCH}")
file(MAKE_DIRECTORY "${SCRATCH}")

foreach(tier IN LISTS tiers)
  if(tier STREQUAL "redis")
    set(at 127.0.0.1:1)  # nobody listens there
    set(expected "not kept.*not found.*goes on with what it computed")
  else()
    set(at "${SCRATCH}/${tier}")
    set(expected "bytes put in.*, computed.*from the tier.*the same")
  endif()
  execute_process(COMMAND "${PROGRAM}" --tier ${tier} --at "${at}" --tokens 200
    OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE result)
  if(NOT result EQUAL 0 OR NOT printed MATCHES "${expected}")
    message(FATAL_ERROR "--tier ${tier} ended with ${result}\n${printed}${errors}")
  endif()
endforeach()
execute_process(COMMAND "${PROGRAM}" --tier nowhere RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
if(result EQUAL 0)
  message(FATAL_ERROR "--tier nowhere was accepted")
endif()
