# SPDX-License-Identifier: MIT
# Install rules: headers, CMake package, pkg-config file. All architecture-independent and relocatable.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(kvcache_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/kvcache")

install(TARGETS kvcache EXPORT kvcache-targets
        FILE_SET HEADERS COMPONENT kvcache
        FILE_SET client_headers COMPONENT kvcache
        FILE_SET fragments COMPONENT kvcache)
install(EXPORT kvcache-targets NAMESPACE kvcache:: DESTINATION "${kvcache_package_dir}"
        COMPONENT kvcache)

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/kvcache-config.cmake.in" "${PROJECT_BINARY_DIR}/kvcache-config.cmake"
  INSTALL_DESTINATION "${kvcache_package_dir}"
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/kvcache-config-version.cmake"
  COMPATIBILITY SameMinorVersion
  ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/kvcache-config.cmake" "${PROJECT_BINARY_DIR}/kvcache-config-version.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/kvcache-clients.cmake"
        DESTINATION "${kvcache_package_dir}" COMPONENT kvcache)

# From <prefix>/share/pkgconfig back to <prefix>, so that the installed tree can be moved.
file(RELATIVE_PATH kvcache_pc_to_prefix "/prefix/${CMAKE_INSTALL_DATADIR}/pkgconfig" "/prefix")
configure_file("${PROJECT_SOURCE_DIR}/cmake/kvcache.pc.in" "${PROJECT_BINARY_DIR}/kvcache.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/kvcache.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig" COMPONENT kvcache)
