# SPDX-License-Identifier: MIT
# A parent that exports a target linking kvcache, and a project that uses the installed parent.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

configure("${CMAKE_CURRENT_LIST_DIR}/exporting_parent" "${WORK_DIR}/parent" "-DKVCACHE_DIR=${kvcache_source}")
run("${CMAKE_COMMAND}" --build "${WORK_DIR}/parent" --config "${build_type}")
run("${CMAKE_COMMAND}" --install "${WORK_DIR}/parent" --config "${build_type}" --prefix "${WORK_DIR}/prefix")
build_and_run(exporting_parent/user "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix;${prefix_path}")
