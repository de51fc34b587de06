// SPDX-License-Identifier: MIT
// Catch2 3 or 2.13, whichever is installed. Tests include this and nothing else of Catch2.
//
// Works with both: TEST_CASE, SECTION, TEMPLATE_TEST_CASE, TEMPLATE_PRODUCT_TEST_CASE, GENERATE, STATIC_REQUIRE, CAPTURE,
// REQUIRE_THROWS_AS, Catch::Matchers::WithinAbs, WithinRel. Does not: Catch::Approx.
#pragma once

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_message.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/catch_tostring.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_adapters.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#else
#include <catch2/catch.hpp>
#endif
