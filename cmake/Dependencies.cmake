# SPDX-License-Identifier: MIT
# What the project needs from outside: an installed package first; else a download pinned by its SHA-256, unless
# KVCACHE_FETCH=OFF; else an error that names the Debian package. Macros, not functions: find_package() has to
# run in the scope of the caller for its targets to be visible in every folder.
include(FetchContent)

# Stops with a message that says what to install, when `name` was not found and may not be downloaded.
function(kvcache_allow_fetch name debian_package)
  if(NOT KVCACHE_FETCH)
    message(FATAL_ERROR
      "kvcache: ${name} was not found. Install it (Debian, Ubuntu: apt install ${debian_package}), "
      "point CMAKE_PREFIX_PATH at it, or allow the download with -DKVCACHE_FETCH=ON.")
  endif()
  message(STATUS "kvcache: ${name} is not installed (Debian, Ubuntu: apt install ${debian_package}); downloading it")
endfunction()

# Downloads and unpacks an archive without running its build files; sets ${name}_SOURCE_DIR.
macro(kvcache_unpack name url sha256)
  FetchContent_Declare(${name}
    URL "${url}"
    URL_HASH SHA256=${sha256}
    DOWNLOAD_EXTRACT_TIMESTAMP FALSE
    SOURCE_SUBDIR unpack-only)  # a folder that does not exist: nothing of it is configured
  FetchContent_MakeAvailable(${name})
endmacro()

# A header-only dependency as a target that exports by name, like the one an installed package gives.
function(kvcache_header_target target include_dir)
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${target} INTERFACE "${include_dir}")
endfunction()

# Eigen 3.4 or newer, 5.x included. A version in find_package() cannot say that: 3.4 refuses 5.x, and the
# range 3.4...5 is refused by Eigen 3.4.0.
macro(kvcache_require_eigen)
  if(NOT TARGET Eigen3::Eigen)
    find_package(Eigen3 CONFIG QUIET)
    if(Eigen3_FOUND AND Eigen3_VERSION VERSION_LESS 3.4)
      message(FATAL_ERROR "kvcache needs Eigen 3.4 or newer, found ${Eigen3_VERSION} in ${Eigen3_DIR}")
    elseif(NOT Eigen3_FOUND)
      kvcache_allow_fetch("Eigen 3.4" libeigen3-dev)
      kvcache_unpack(kvcache_eigen
        "https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz"
        8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72)
      kvcache_header_target(Eigen3::Eigen "${kvcache_eigen_SOURCE_DIR}")
    endif()
  endif()
endmacro()

# Catch2 3 when there, else 2.13. Both give Catch2::Catch2WithMain, except upstream's header-only 2.13: the
# tests then compile their own main (tests/CMakeLists.txt).
macro(kvcache_require_catch2)
  if(NOT TARGET Catch2::Catch2)
    find_package(Catch2 3 CONFIG QUIET)
    if(NOT Catch2_FOUND)
      find_package(Catch2 2.13 CONFIG QUIET)
    endif()
    if(NOT Catch2_FOUND)
      kvcache_allow_fetch("Catch2 3 or 2.13" catch2)
      FetchContent_Declare(Catch2
        URL "https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz"
        URL_HASH SHA256=c991b247a1a0d7bb9c39aa35faf0fe9e19764213f28ffba3109388e62ee0269c
        DOWNLOAD_EXTRACT_TIMESTAMP FALSE)
      FetchContent_MakeAvailable(Catch2)
    endif()
  endif()
endmacro()

macro(kvcache_require_benchmark)
  if(NOT TARGET benchmark::benchmark)
    find_package(benchmark 1.7 CONFIG QUIET)
    if(NOT benchmark_FOUND)
      kvcache_allow_fetch("Google Benchmark 1.7" libbenchmark-dev)
      set(BENCHMARK_ENABLE_TESTING OFF)
      set(BENCHMARK_ENABLE_INSTALL OFF)
      set(BENCHMARK_ENABLE_WERROR OFF)
      set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
      FetchContent_Declare(benchmark
        URL "https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz"
        URL_HASH SHA256=32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
        DOWNLOAD_EXTRACT_TIMESTAMP FALSE)
      FetchContent_MakeAvailable(benchmark)
    endif()
  endif()
endmacro()

macro(kvcache_require_nlohmann_json)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    find_package(nlohmann_json 3.10 CONFIG QUIET)
    if(NOT nlohmann_json_FOUND)
      kvcache_allow_fetch("nlohmann_json 3.10" nlohmann-json3-dev)
      kvcache_unpack(kvcache_nlohmann_json
        "https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz"
        d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
      kvcache_header_target(nlohmann_json::nlohmann_json "${kvcache_nlohmann_json_SOURCE_DIR}/include")
    endif()
  endif()
endmacro()

macro(kvcache_require_cli11)
  if(NOT TARGET CLI11::CLI11)
    find_package(CLI11 2.1 CONFIG QUIET)
    if(NOT CLI11_FOUND)
      kvcache_allow_fetch("CLI11 2.1" libcli11-dev)
      kvcache_unpack(kvcache_cli11
        "https://github.com/CLIUtils/CLI11/archive/v2.4.2.tar.gz"
        f2d893a65c3b1324c50d4e682c0cdc021dd0477ae2c048544f39eed6654b699a)
      kvcache_header_target(CLI11::CLI11 "${kvcache_cli11_SOURCE_DIR}/include")
    endif()
  endif()
endmacro()

# MPI, only if it is installed: without it what uses interop/mpi.hpp is left out.
macro(kvcache_find_mpi)
  if(NOT TARGET MPI::MPI_CXX)
    find_package(MPI QUIET COMPONENTS CXX)
    get_property(kvcache_told_of_mpi GLOBAL PROPERTY kvcache_told_of_mpi)
    if(NOT MPI_CXX_FOUND AND NOT kvcache_told_of_mpi)
      set_property(GLOBAL PROPERTY kvcache_told_of_mpi TRUE)
      message(STATUS "kvcache: no MPI, so what uses it is left out (Debian, Ubuntu: apt install libopenmpi-dev openmpi-bin)")
    endif()
  endif()
endmacro()
