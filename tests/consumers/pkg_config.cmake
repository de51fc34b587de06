# SPDX-License-Identifier: MIT
# pkg-config: the flags of the installed kvcache.pc are all a compiler needs.
include("${CMAKE_CURRENT_LIST_DIR}/steps.cmake")

install_kvcache("${WORK_DIR}/prefix")
set(ENV{PKG_CONFIG_PATH} "${WORK_DIR}/prefix/share/pkgconfig:$ENV{PKG_CONFIG_PATH}")
execute_process(COMMAND "${pkg_config}" --cflags kvcache OUTPUT_VARIABLE flags COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
compile_and_run(${flags} "${sources}/main.cpp")
