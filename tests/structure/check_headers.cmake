# SPDX-License-Identifier: MIT
# cmake -DINCLUDE_DIR=<folder that holds kvcache/> -P check_headers.cmake
# The rules that keep the folder tree the architecture diagram; prints every break, then fails if there was one.
cmake_minimum_required(VERSION 3.24)

# ---- the table ------------------------------------------------------------------------------------------------------
# Lowest first. A header may include its own folder, any folder above it in this list, fwd.hpp and version.hpp.
set(layers core block kernel codec cache attention eviction serving store interop)

# Layers that see caches through these headers of cache/ only, never a container.
set(concepts_only attention eviction)
set(cache_concepts cache/concepts.hpp cache/keep_tokens.hpp cache/positions.hpp)

# Folders that may not be used by a layer although they lie below it.
set(forbidden_eviction attention)
set(forbidden_serving attention)
set(forbidden_store attention)

# Headers that may bring in Eigen (a regular expression on the path below kvcache/).
set(may_use_eigen "^(attention/multi_head_attention|codec/low_rank|interop/[a-z0-9_]+)\\.hpp$")

# Headers that need more than Eigen/Core and the standard library; kvcache.hpp leaves them out.
set(optional_headers codec/klt.hpp codec/low_rank.hpp interop/eigen_thread_pool.hpp interop/low_rank_snapshot.hpp
    interop/low_rank_spec.hpp interop/mpi.hpp
    store/lmdb_environment.hpp store/lmdb_tier.hpp store/redis_cluster.hpp store/redis_connection.hpp store/redis_parts.hpp
    store/redis_tier.hpp store/zstd.hpp)

# Client libraries, and the one header that each may be included by.
set(clients "lmdb\\.h|hiredis/|zstd\\.h")
set(may_use_clients "^store/(lmdb_environment|redis_connection|zstd)\\.hpp$")

# Parts that several headers include, each inside a namespace of its own.
set(fragments "^kernel/[a-z0-9_]+\\.inl$")

set(max_lines 400)

# ---- the check ------------------------------------------------------------------------------------------------------
set(num_breaks 0)
macro(report text)
  message("${text}")
  math(EXPR num_breaks "${num_breaks} + 1")
endmacro()

set(root "${INCLUDE_DIR}/kvcache")
file(GLOB_RECURSE headers RELATIVE "${root}" "${root}/*")
list(SORT headers)
if(NOT headers)
  report("${root}: no headers")
endif()

foreach(header IN LISTS headers)
  set(path "${root}/${header}")
  if(NOT header MATCHES "\\.hpp$" AND NOT header MATCHES "${fragments}")
    report("${header}: only .hpp files belong here")
    continue()
  endif()

  # Brackets and semicolons mean something in CMake lists; nothing here needs them.
  file(READ "${path}" text)
  string(REGEX REPLACE "[][;]" " " text "${text}")
  string(REGEX MATCHALL "\n" newlines "${text}")
  list(LENGTH newlines num_lines)
  if(num_lines GREATER max_lines)
    report("${header}: ${num_lines} lines, more than ${max_lines}: does it still define one thing?")
  endif()

  if(NOT text MATCHES "^// SPDX-License-Identifier: MIT\n")
    report("${header}:1: the first line is not the SPDX line")
  endif()
  if(header MATCHES "\\.hpp$" AND NOT text MATCHES "^(//[^\n]*\n|\n)*#pragma once\n")
    report("${header}: code before #pragma once, or none")
  elseif(header MATCHES "${fragments}" AND text MATCHES "#pragma once")
    report("${header}: #pragma once would keep the second namespace from including it")
  endif()

  # "" at the top, otherwise the folder
  cmake_path(GET header PARENT_PATH layer)
  set(allowed "")
  if(layer)
    list(FIND layers "${layer}" depth)
    if(depth EQUAL -1)
      report("${header}: folder '${layer}' is not a layer")
      continue()
    endif()
    list(SUBLIST layers 0 ${depth} allowed)
    list(APPEND allowed ${layer})
    list(REMOVE_ITEM allowed ${forbidden_${layer}} "")
  elseif(header STREQUAL "kvcache.hpp")
    set(allowed ${layers})
  elseif(header STREQUAL "fwd.hpp")
    set(allowed core)
  endif()

  set(includes_of_${header} "")
  string(REGEX MATCHALL "(^|\n)[ \t]*#[ \t]*include[ \t]*[<\"][^>\"\n]*[>\"]" lines "${text}")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^.*[<\"](.*)[>\"]$" "\\1" included "${line}")
    if(line MATCHES "\"")
      report("${header}: write #include <${included}>, in angle brackets and from kvcache/ on")
    elseif(included MATCHES "^(unsupported/)?Eigen/")
      if(NOT header MATCHES "${may_use_eigen}")
        report("${header}: includes <${included}>; Eigen enters through multi_head_attention, low_rank and interop only")
      endif()
    elseif(included MATCHES "^(${clients})" AND NOT header MATCHES "${may_use_clients}")
      report("${header}: includes <${included}>; a client library enters through one header of store/ only")
    elseif(included MATCHES "^kvcache/(.*)$")
      set(target "${CMAKE_MATCH_1}")
      list(APPEND includes_of_${header} "${target}")
      cmake_path(GET target PARENT_PATH target_layer)
      if(NOT EXISTS "${root}/${target}")
        report("${header}: includes <${included}>, which does not exist")
      elseif(target STREQUAL "kvcache.hpp")
        report("${header}: includes <kvcache/kvcache.hpp>; include what is used")
      elseif(NOT target_layer)
        # fwd.hpp and version.hpp may be included from everywhere
      elseif(NOT target_layer IN_LIST allowed)
        report("${header}: includes <${included}>; ${layer} may use: ${allowed}")
      elseif(layer IN_LIST concepts_only AND target_layer STREQUAL "cache" AND NOT target IN_LIST cache_concepts)
        report("${header}: includes <${included}>; of cache/ only ${cache_concepts} may be used here")
      endif()
    endif()
  endforeach()
endforeach()

# ---- everything is reachable from kvcache.hpp -----------------------------------------------------------------------
set(reached "")
set(queue kvcache.hpp)
while(queue)
  list(POP_FRONT queue header)
  if(NOT header IN_LIST reached)
    list(APPEND reached "${header}")
    list(APPEND queue ${includes_of_${header}})
  endif()
endwhile()
foreach(header IN LISTS headers)
  if(header IN_LIST optional_headers)
    if(header IN_LIST reached)
      report("${header}: needs another library, so kvcache.hpp may not reach it")
    endif()
  elseif(NOT header IN_LIST reached)
    report("${header}: not reachable from kvcache.hpp")
  endif()
endforeach()

if(num_breaks GREATER 0)
  message(FATAL_ERROR "${num_breaks} broken; the rules are at the top of tests/structure/check_headers.cmake")
endif()
list(LENGTH headers num_headers)
message(STATUS "${num_headers} headers keep the rules")
