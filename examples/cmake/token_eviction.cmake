# SPDX-License-Identifier: MIT
# `stream_forever` stays within its budget, with every policy; `compare_evictions` prints its table; exit code 2 for bad
# arguments and 1 for bad files.
cmake_minimum_required(VERSION 3.24)

# run(<program> <exit code> <regular expression that stdout + stderr must match> <argument>...)
function(run program expected_code pattern)
  execute_process(COMMAND "${program}" ${ARGN} OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE code)
  if(NOT code EQUAL expected_code)
    message(FATAL_ERROR "${program} ${ARGN}\nended with ${code}, not ${expected_code}\n${printed}${errors}")
  endif()
  if(NOT "${printed}${errors}" MATCHES "${pattern}")
    message(FATAL_ERROR "${program} ${ARGN}\ndid not print ${pattern}\n${printed}${errors}")
  endif()
  set(printed "${printed}" PARENT_SCOPE)
endfunction()

# 64 tokens at most, 48 after an eviction: the first at token 65, then one for every 16. Sinks and window are two segments.
run("${STREAM}" 0 "\n +45 +52 +52 +131,072 +1 +0 .*\n +180 +59 +64 +131,072 +2 +8 " --model "${MODEL}" --tokens 180 --budget 64 --quiet)
foreach(policy window h2o tova snapkv keydiff)
  run("${STREAM}" 0 "policy ${policy}.*\n +90 +[0-9]+ +64 +131,072 " --model "${MODEL}" --tokens 90 --budget 64 --quiet
    --policy ${policy})
endforeach()
run("${STREAM}" 0 "\n +90 +[0-9]+ +64 +" --model "${MODEL}" --tokens 90 --budget 64 --quiet --policy h2o --unit 1 --gaps
  --cache chunked/int8)
run("${STREAM}" 0 "\n +90 +[0-9]+ +96 +.*\n +120 " --model "${MODEL}" --tokens 120 --budget 96 --quiet --policy tova
  --cache contiguous/k=channel4,v=rotated4,sinks=4,tail=32)

# A seed is a text, whatever the container.
run("${STREAM}" 0 "^ROMEO:" --model "${MODEL}" --tokens 80 --budget 64)
string(REGEX REPLACE "\n\npolicy.*" "" first "${printed}")
run("${STREAM}" 0 "" --model "${MODEL}" --tokens 80 --budget 64 --cache chunked/bf16)
string(REGEX REPLACE "\n\npolicy.*" "" second "${printed}")
if(NOT first STREQUAL second)
  message(FATAL_ERROR "one seed gave two texts\n${first}\n${second}")
endif()

run("${COMPARE}" 0 "1/8 blocks seen.*\nwindow .*\nsinks .*\nh2o .*\ntova .*\nsnapkv .*\nkeydiff .*\nrandom " --model "${MODEL}"
  --documents 1 --unit 16)
if(NOT printed MATCHES "8 questions about 1 documents.* all tokens kept: 100.0")
  message(FATAL_ERROR "not what the model knows\n${printed}")
endif()

run("${STREAM}" 2 "bogus" --bogus)
run("${STREAM}" 2 "--policy: .*'lru'.*h2o" --policy lru)
run("${STREAM}" 2 "--tokens" --tokens 1)
run("${STREAM}" 2 "--budget" --budget 63)
run("${STREAM}" 2 "--unit" --unit 3)
run("${STREAM}" 2 "--block-size" --block-size 20)
run("${STREAM}" 2 "--cache.*bf61" --cache paged/bf61)
run("${STREAM}" 2 "--temperature" --temperature nan)
run("${STREAM}" 2 "--seed" --seed -1)
run("${STREAM}" 1 "nowhere" --model "${MODEL}/nowhere")
run("${COMPARE}" 2 "--documents" --documents 0)
run("${COMPARE}" 2 "--unit" --unit 3)
run("${COMPARE}" 2 "--cache" --cache bf16)
run("${COMPARE}" 1 "nowhere" --model "${MODEL}/nowhere")
