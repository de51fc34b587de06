# SPDX-License-Identifier: MIT
# cmake -DWORK_DIR=<scratch folder> -P check_the_check.cmake
# Builds small header trees, one per rule, and sees that check_headers.cmake passes the good one and names the
# broken rule in each of the others.
cmake_minimum_required(VERSION 3.24)

set(good_head "// SPDX-License-Identifier: MIT\n// what this is\n#pragma once\n\n")

function(write_header path)
  string(CONCAT text ${ARGN})
  file(WRITE "${WORK_DIR}/kvcache/${path}" "${text}")
endfunction()

# A tree that keeps all rules.
function(write_good_tree)
  file(REMOVE_RECURSE "${WORK_DIR}")
  write_header(core/types.hpp "${good_head}" "#include <cstddef>\n")
  write_header(cache/concepts.hpp "${good_head}" "#include <kvcache/core/types.hpp>\n")
  write_header(cache/paged.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n")
  write_header(attention/attend.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n")
  write_header(attention/multi_head_attention.hpp
    "${good_head}" "#include <kvcache/attention/attend.hpp>\n\n#include <Eigen/Core>\n")
  write_header(store/redis_connection.hpp "${good_head}" "#include <hiredis/hiredis.h>\n")
  write_header(kvcache.hpp "${good_head}"
    "#include <kvcache/attention/multi_head_attention.hpp>\n#include <kvcache/cache/paged.hpp>\n")
endfunction()

function(expect name pattern)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" "-DINCLUDE_DIR=${WORK_DIR}" -P "${CMAKE_CURRENT_LIST_DIR}/check_headers.cmake"
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(pattern STREQUAL "")
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "${name}: refused\n${output}")
    endif()
  elseif(result EQUAL 0 OR NOT output MATCHES "${pattern}")
    message(FATAL_ERROR "${name}: expected a break that matches '${pattern}', got\n${output}")
  endif()
endfunction()

write_good_tree()
expect("a good tree" "")

write_good_tree()
write_header(core/types.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n")
expect("an include that points up" "core/types.hpp: includes <kvcache/cache/concepts.hpp>")

write_good_tree()
write_header(attention/attend.hpp "${good_head}"
  "#include <kvcache/cache/concepts.hpp>\n#  include <kvcache/cache/paged.hpp>\n")
expect("attention that names a container" "attention/attend.hpp: includes <kvcache/cache/paged.hpp>")

write_good_tree()
write_header(cache/paged.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n#include <Eigen/Core>\n")
expect("a container with Eigen" "cache/paged.hpp: includes <Eigen/Core>")

write_good_tree()
write_header(attention/attend.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n#include <kvcache/kvcache.hpp>\n")
expect("the umbrella included from below" "attention/attend.hpp: includes <kvcache/kvcache.hpp>")

write_good_tree()
write_header(core/types.hpp "${good_head}" "#include \"status.hpp\"\n")
expect("a relative include" "core/types.hpp: write #include <status.hpp>")

write_good_tree()
write_header(core/types.hpp "${good_head}" "#include <kvcache/core/status.hpp>\n")
expect("an include of nothing" "core/status.hpp>, which does not exist")

write_good_tree()
write_header(core/types.hpp "#pragma once\n")
expect("no SPDX line" "core/types.hpp:1: the first line is not the SPDX line")

write_good_tree()
write_header(core/types.hpp "// SPDX-License-Identifier: MIT\n#include <cstddef>\n#pragma once\n")
expect("code before #pragma once" "core/types.hpp: code before #pragma once")

write_good_tree()
string(REPEAT "int x;\n" 400 many_lines)
write_header(core/types.hpp "${good_head}" "${many_lines}")
expect("a long header" "core/types.hpp: 404 lines")

write_good_tree()
write_header(core/lost.hpp "${good_head}")
expect("a header nobody includes" "core/lost.hpp: not reachable from kvcache.hpp")

write_good_tree()
write_header(kvcache.hpp "${good_head}" "#include <kvcache/attention/multi_head_attention.hpp>\n"
  "#include <kvcache/cache/paged.hpp>\n#include <kvcache/store/redis_connection.hpp>\n")
expect("an optional header in the umbrella" "store/redis_connection.hpp: needs another library")

write_good_tree()
write_header(cache/paged.hpp "${good_head}" "#include <kvcache/cache/concepts.hpp>\n#include <lmdb.h>\n")
expect("a container with a client library" "cache/paged.hpp: includes <lmdb.h>")

write_good_tree()
write_header(misc/odd.hpp "${good_head}")
expect("a folder that is no layer" "misc/odd.hpp: folder 'misc' is not a layer")

write_good_tree()
write_header(kernel/shared.inl "${good_head}")
expect("a fragment with #pragma once" "kernel/shared.inl: #pragma once would keep")

write_good_tree()
write_header(cache/shared.inl "// SPDX-License-Identifier: MIT\n")
expect("a fragment outside kernel" "cache/shared.inl: only .hpp files belong here")
