// SPDX-License-Identifier: MIT
// The main of all tests where Catch2 2.13 comes without one.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
