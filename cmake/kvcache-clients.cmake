# SPDX-License-Identifier: MIT
# kvcache::lmdb, kvcache::redis and kvcache::zstd: kvcache::kvcache with the client library that the headers of that name
# need. Part of the installed package, and of the build.

# kvcache_find_client(<lmdb|redis|zstd>): makes the target if the library is there, and sets kvcache_<client>_FOUND; else
# kvcache_<client>_PACKAGE has what to install. KVCACHE_<CLIENT>_INCLUDE_DIR and KVCACHE_<CLIENT>_LIBRARY say where it is; OFF: nowhere.
macro(kvcache_find_client client)
  set(kvcache_lmdb_files lmdb.h lmdb liblmdb-dev)
  set(kvcache_redis_files hiredis/hiredis.h hiredis libhiredis-dev)
  set(kvcache_zstd_files zstd.h zstd libzstd-dev)
  list(GET kvcache_${client}_files 0 kvcache_client_header)
  list(GET kvcache_${client}_files 1 kvcache_client_library)
  list(GET kvcache_${client}_files 2 kvcache_${client}_PACKAGE)
  string(TOUPPER ${client} kvcache_client_name)
  find_path(KVCACHE_${kvcache_client_name}_INCLUDE_DIR ${kvcache_client_header})
  find_library(KVCACHE_${kvcache_client_name}_LIBRARY ${kvcache_client_library})
  mark_as_advanced(KVCACHE_${kvcache_client_name}_INCLUDE_DIR KVCACHE_${kvcache_client_name}_LIBRARY)
  if(KVCACHE_${kvcache_client_name}_INCLUDE_DIR AND KVCACHE_${kvcache_client_name}_LIBRARY)
    set(kvcache_${client}_FOUND TRUE)
    if(NOT TARGET kvcache::${client})
      add_library(kvcache::${client} INTERFACE IMPORTED GLOBAL)
      target_include_directories(kvcache::${client} INTERFACE "${KVCACHE_${kvcache_client_name}_INCLUDE_DIR}")
      target_link_libraries(kvcache::${client} INTERFACE
        kvcache::kvcache "${KVCACHE_${kvcache_client_name}_LIBRARY}")
    endif()
  else()
    set(kvcache_${client}_FOUND FALSE)
  endif()
endmacro()
