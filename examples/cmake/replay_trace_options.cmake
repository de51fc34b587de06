# SPDX-License-Identifier: MIT
# The command line of `replay_trace`: a file is replayed and drawn, exit code 2 for bad arguments and 1 for bad files,
# each with a message that says what is wrong.
cmake_minimum_required(VERSION 3.24)

# run(<exit code> <regular expression that stdout + stderr must match> <argument>...)
function(run expected_code pattern)
  execute_process(COMMAND "${PROGRAM}" ${ARGN} OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE code)
  if(NOT code EQUAL expected_code)
    message(FATAL_ERROR "replay_trace ${ARGN}\nended with ${code}, not ${expected_code}\n${printed}${errors}")
  endif()
  if(NOT "${printed}${errors}" MATCHES "${pattern}")
    message(FATAL_ERROR "replay_trace ${ARGN}\ndid not print ${pattern}\n${printed}${errors}")
  endif()
endfunction()

file(REMOVE_RECURSE "${SCRATCH}")
file(MAKE_DIRECTORY "${SCRATCH}")
set(line "{\"timestamp\": 0, \"input_length\": 1500, \"output_length\": 9, \"hash_ids\": [1, 2, 3]}\n")
file(WRITE "${SCRATCH}/good.jsonl" "${line}${line}")
file(WRITE "${SCRATCH}/bad.jsonl" "${line}{\"hash_ids\": [1, 2\n")

run(0 "good.jsonl: 2 requests, 6 blocks, 3 of them different; 50.0 % .*lru +33.3 +50.0.*optimum +33.3 +50.0"
  "${SCRATCH}/good.jsonl" --capacity 2,100% --svg "${SCRATCH}/chart.svg")
file(READ "${SCRATCH}/chart.svg" chart)
if(NOT chart MATCHES "^<svg .*good.jsonl.*s3_fifo.*optimum.*</svg>\n$")
  message(FATAL_ERROR "not the chart that was asked for:\n${chart}")
endif()
run(0 "multi-turn: 50 requests" --workload multi-turn --requests 50 --seed 3 --tail-first --no-chart)

run(1 "bad.jsonl: line 2: not valid JSON" "${SCRATCH}/bad.jsonl" --no-chart)
run(1 "none.jsonl: no such file" "${SCRATCH}/none.jsonl" --no-chart)
run(1 "chart.svg: cannot be written" --requests 10 --svg "${SCRATCH}/none/chart.svg")
run(2 "bogus" --bogus)
run(2 "chess" --workload chess)
run(2 "--requests" --requests 0)
run(2 "-1" --seed -1)
foreach(capacity 0 -5 0% 101% nan% 3.5 x "")
  run(2 "--capacity" --capacity "${capacity}")
endforeach()
