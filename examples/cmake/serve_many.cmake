# SPDX-License-Identifier: MIT
# `serve_many` serves conversations under a budget that does not hold them: every text is what it is alone, blocks were
# evicted, others reused, and the process stays within the budget. Exit code 2 for bad arguments, 1 for bad files.
cmake_minimum_required(VERSION 3.24)

# run(<exit code> <regular expression that stdout + stderr must match> <argument>...)
function(run expected_code pattern)
  execute_process(COMMAND "${PROGRAM}" ${ARGN}
    OUTPUT_VARIABLE printed ERROR_VARIABLE errors
    RESULT_VARIABLE code)
  if(NOT code EQUAL expected_code)
    message(FATAL_ERROR "serve_many ${ARGN}\nended with ${code}, not ${expected_code}\n${printed}${errors}")
  endif()
  if(NOT "${printed}${errors}" MATCHES "${pattern}")
    message(FATAL_ERROR "serve_many ${ARGN}\ndid not print ${pattern}\n${printed}${errors}")
  endif()
  set(printed "${printed}" PARENT_SCOPE)
  set(errors "${errors}" PARENT_SCOPE)
endfunction()

# number(<variable> <row>): the first cell of a row of the table, without its commas; "not" where it is not known
function(number variable row)
  if(NOT printed MATCHES "\n *${row} +([0-9.,]+|not|-)")
    message(FATAL_ERROR "no row '${row}'\n${printed}")
  endif()
  string(REPLACE "," "" value "${CMAKE_MATCH_1}")
  set(${variable} "${value}" PARENT_SCOPE)
endfunction()

set(small --model "${MODEL}" --conversations 10 --turns 2 --system-prompts 2 --system-tokens 128
  --user-tokens 120 --answer-tokens 4 --no-compare)
run(0 "identical to running alone: 10 of 10 conversations" ${small} --budget 4MiB --verify)
if(NOT errors STREQUAL "")
  message(FATAL_ERROR "the line that changes is for terminals only\n${errors}")
endif()
number(evictions "evictions")
number(hit_rate "hit rate, % of prompt tokens")
number(budget "budget, bytes")
number(counted "peak, counted, bytes")
number(process "peak, of the process, bytes")
if(NOT evictions GREATER 0 OR NOT hit_rate GREATER 0 OR NOT budget EQUAL 4194304 OR counted GREATER budget)
  message(FATAL_ERROR "nothing evicted, nothing reused, or more held than the budget\n${printed}")
endif()
math(EXPR most "${budget} * 105 / 100")
if(NOT process STREQUAL "not" AND process GREATER most)
  message(FATAL_ERROR "the process took more than 5 % above the budget\n${printed}")
endif()

# What is evicted goes to files and comes back as it was. The tier is not part of the budget, nor is what its client
# library works in: LMDB has half a MiB.
file(REMOVE_RECURSE "${SCRATCH}")
run(0 "identical to running alone: 10 of 10 conversations" ${small} --budget 4MiB --verify --spill "${SCRATCH}")
foreach(what IN ITEMS "spilled, blocks" "spilled, bytes" "brought back, blocks" "brought back, bytes")
  number(passed "${what}")
  if(NOT passed GREATER 0)
    message(FATAL_ERROR "${what}: none\n${printed}")
  endif()
endforeach()
number(counted "peak, counted, bytes")
number(process "peak, of the process, bytes")
math(EXPR most "${budget} * 105 / 100 + 1048576")
if(counted GREATER budget OR (NOT process STREQUAL "not" AND process GREATER most))
  message(FATAL_ERROR "more was held than the budget\n${printed}")
endif()
file(GLOB left "${SCRATCH}/*")
if(NOT left STREQUAL "")
  message(FATAL_ERROR "files were left behind: ${left}")
endif()

# Re-encoding comes before dropping where it is asked for, also of conversations that share most of what they have.
run(0 "re-encoding" ${small} --budget 4MiB --recode)
number(before "re-encoded, bytes before")
number(after "re-encoded, bytes after")
number(counted "peak, counted, bytes")
if(NOT before GREATER 0 OR NOT after GREATER 0 OR NOT after LESS before OR counted GREATER budget)
  message(FATAL_ERROR "nothing was re-encoded, or more held than the budget\n${printed}")
endif()

# Too little for one conversation is said, not tried for ever.
run(1 "do not hold one sequence" ${small} --budget 256KiB)

run(2 "bogus" --bogus)
run(2 "--policy" --policy fifo)
run(2 "--budget" --budget 1KiB)
run(2 "--conversations" --conversations 0)
run(2 "--seed" --seed -1)
run(2 "context" --model "${MODEL}" --turns 40)
run(1 "nowhere" --model "${MODEL}/nowhere")
