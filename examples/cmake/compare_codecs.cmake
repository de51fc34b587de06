# SPDX-License-Identifier: MIT
# `compare_codecs` on few tokens: its tables and its chart come out, exit code 2 for bad arguments and 1 for bad files.
cmake_minimum_required(VERSION 3.24)

# run(<exit code> <regular expression that stdout + stderr must match> <argument>...)
function(run expected_code pattern)
  execute_process(COMMAND "${PROGRAM}" ${ARGN} OUTPUT_VARIABLE printed ERROR_VARIABLE errors RESULT_VARIABLE code)
  if(NOT code EQUAL expected_code)
    message(FATAL_ERROR "compare_codecs ${ARGN}\nended with ${code}, not ${expected_code}\n${printed}${errors}")
  endif()
  if(NOT "${printed}${errors}" MATCHES "${pattern}")
    message(FATAL_ERROR "compare_codecs ${ARGN}\ndid not print ${pattern}\n${printed}${errors}")
  endif()
  set(printed "${printed}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE "${SCRATCH}")
file(MAKE_DIRECTORY "${SCRATCH}")

# Tables and chart.
run(0 "Bigger models were not measured" --model "${MODEL}" --tokens 16 --texts 1 --documents 0 --heads 1 --head-tokens 256
  --codecs "int8 k=channel4,v=rotated4 rotated2,tail=16" --svg "${SCRATCH}/chart.svg")
foreach(needed "Normally distributed rows" "x bound" "KL of weights" "same first" "\nint8 +128 +" "\nint8 +0 +"
    "\nk=channel4,v=rotated4 +128 +" "\nint8 +128 f16 +" "\nrotated2,tail=16 +own +")
  if(NOT printed MATCHES "${needed}")
    message(FATAL_ERROR "no \"${needed}\" in\n${printed}")
  endif()
endforeach()
file(READ "${SCRATCH}/chart.svg" chart)
foreach(needed "^<svg " "</svg>\n$" "Shannon bound" "relative mean squared error" "bits per number" ">int8</text>"
    "<circle" "Synthetic heads" "no exact tail")
  if(NOT chart MATCHES "${needed}")
    message(FATAL_ERROR "no \"${needed}\" in\n${chart}")
  endif()
endforeach()

# Every codec there is, one part.
run(0 "\nbalanced2 .*\nk=int8,v=rotated4 " --part gaussian)
if(printed MATCHES "Synthetic|model")
  message(FATAL_ERROR "--part gaussian printed more\n${printed}")
endif()

# Bad arguments.
run(2 "bogus" --bogus)
run(2 "--codecs.*no codec 'rotated5' .did you mean rotated4\\?.; there is .*rotated4" --codecs rotated5)
run(2 "--codecs" --codecs "int8 ")
run(2 "--part" --part all-of-it)
run(2 "--tokens" --tokens 1)
run(2 "--tokens" --tokens many)
run(2 "--texts" --texts 0)
run(2 "--documents" --documents -1)
run(2 "--heads" --heads 0)
run(2 "--head-tokens: a multiple" --head-tokens 200)
run(2 "--head-tokens" --head-tokens 64)
run(2 "--block-size" --block-size 48)
run(2 "--seed" --seed -1)
run(0 "--codecs" --help)

# Bad files.
run(1 "nowhere: no such file" --part model --model "${SCRATCH}/nowhere")
run(1 "chart.svg: cannot be written" --part gaussian --svg "${SCRATCH}/nowhere/chart.svg")
