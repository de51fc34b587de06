# SPDX-License-Identifier: MIT
# A missing dependency that may not be downloaded: the error says what to install.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

expect_failure("apt[ \n]+install[ \n]+libeigen3-dev"
  "${CMAKE_COMMAND}" -S "${kvcache_source}" -B "${WORK_DIR}/build" ${configure_options}
  -DKVCACHE_FETCH=OFF -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON)
expect_failure("apt[ \n]+install[ \n]+catch2"
  "${CMAKE_COMMAND}" -S "${kvcache_source}" -B "${WORK_DIR}/build" ${configure_options}
  -DKVCACHE_FETCH=OFF -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=OFF -DCMAKE_DISABLE_FIND_PACKAGE_Catch2=ON)
