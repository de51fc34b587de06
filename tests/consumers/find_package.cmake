# SPDX-License-Identifier: MIT
# find_package(kvcache 0.1) finds the installed package and builds with it; 0.2 is refused.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

install_kvcache("${WORK_DIR}/prefix")
build_and_run(installed -DWANTED_VERSION=0.1 "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix;${prefix_path}")
expect_failure("compatible with requested[ \n]+version \"0.2\""
  "${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/installed" -B "${WORK_DIR}/build-newer" ${configure_options}
  -DWANTED_VERSION=0.2 "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix;${prefix_path}")
