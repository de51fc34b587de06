# SPDX-License-Identifier: MIT
# find_package(kvcache COMPONENTS lmdb redis) gives targets that bring the client libraries; a component that cannot be had
# is an error that names its package.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

install_kvcache("${WORK_DIR}/prefix")
set(where "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix;${prefix_path}")
build_and_run(clients "-DWANTED_CLIENTS=lmdb redis" "${where}")
expect_failure("apt install[ \n]+liblmdb-dev"
  "${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/clients" -B "${WORK_DIR}/build-without" ${configure_options}
  "-DWANTED_CLIENTS=lmdb" -DKVCACHE_LMDB_LIBRARY=OFF "${where}")
