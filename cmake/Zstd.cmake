# SPDX-License-Identifier: MIT
# kvcache::zstd: kvcache and libzstd, for programs that include <kvcache/store/zstd.hpp>. Debian, Ubuntu: libzstd-dev.
if(NOT TARGET kvcache::zstd)
  find_path(KVCACHE_ZSTD_INCLUDE_DIR zstd.h)
  find_library(KVCACHE_ZSTD_LIBRARY NAMES zstd)
  mark_as_advanced(KVCACHE_ZSTD_INCLUDE_DIR KVCACHE_ZSTD_LIBRARY)
  if(KVCACHE_ZSTD_INCLUDE_DIR AND KVCACHE_ZSTD_LIBRARY)
    add_library(kvcache::zstd INTERFACE IMPORTED GLOBAL)
    target_include_directories(kvcache::zstd INTERFACE "${KVCACHE_ZSTD_INCLUDE_DIR}")
    target_link_libraries(kvcache::zstd INTERFACE kvcache::kvcache "${KVCACHE_ZSTD_LIBRARY}")
  endif()
endif()
