// SPDX-License-Identifier: MIT
// The same rows are the same bytes, whatever the processor, the compiler and its options: against checksums. An encoding
// that changes gets a new name, and with it a new line here, or all files a new version (codec/description.hpp).

#include <kvcache/block/order.hpp>
#include <kvcache/codec/centred.hpp>
#include <kvcache/codec/klt.hpp>
#include <kvcache/codec/low_rank.hpp>
#include <kvcache/codec/rope_turns.hpp>
#include <kvcache/codec/rotated.hpp>
#include <kvcache/codec/rotation.hpp>
#include <kvcache/core/memory.hpp>
#include <kvcache/core/shape.hpp>
#include <kvcache/core/status.hpp>
#include <kvcache/interop/any_codec.hpp>
#include <kvcache/interop/codec_spec.hpp>
#include <kvcache/kernel/select.hpp>
#include <kvcache/store/crc32c.hpp>

#include "support/catch.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

using kvcache::any_codec;
using kvcache::cache_shape;
using kvcache::index_t;
namespace codec = kvcache::codec;
namespace kernel = kvcache::kernel;

namespace {

/// Whole numbers over powers of two, roughly normal: no rounding that a library could do in its own way.
class numbers {
 public:
  float operator()(float divisor = 256) {
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
      state_ = state_ * 6364136223846793005U + 1442695040888963407U;
      sum += static_cast<int>(state_ >> 54) - 512;
    }
    return static_cast<float>(sum) / divisor;
  }
  std::vector<float> rows(index_t count, float divisor = 256) {
    std::vector<float> made(static_cast<std::size_t>(count));
    std::generate(made.begin(), made.end(), [&] { return (*this)(divisor); });
    return made;
  }

 private:
  std::uint64_t state_ = 1;
};

/// Of both pairings, one for each half of the sizes.
std::shared_ptr<const codec::rope_turns> turns_for(index_t head_dim) {
  if (head_dim < 2) return nullptr;
  const auto pairing = head_dim % 8 == 4 ? kvcache::rope_pairing::interleaved : kvcache::rope_pairing::half;
  return std::make_shared<const codec::rope_turns>(
      kvcache::rope_config{.head_dim = head_dim, .pairing = pairing, .rotary_dim = head_dim / 2 * 2});
}

/// Bases that come from no calibration, whose decomposition would be the library's.
std::shared_ptr<const codec::low_rank_bases> made_up_bases(index_t head_dim, codec::low_rank_layout layout) {
  numbers next;
  codec::low_rank_matrices made;
  made.key_layout = made.value_layout = layout;
  made.keys_in = next.rows(head_dim * head_dim, 4096);
  made.values = next.rows(head_dim * head_dim, 4096);
  for (index_t i = 0; i < head_dim; ++i) {
    made.key_spreads.push_back(0.5F + static_cast<float>(i % 7) / 4);
    made.value_spreads.push_back(0.25F + static_cast<float>(i % 5) / 2);
  }
  return std::make_shared<const codec::low_rank_bases>(cache_shape{1, 1, head_dim, 64}, made);
}

/// Orthogonal, one for each head: pairs of dims are turned by 3-4-5 triangles, so that no entry is rounded in its own way.
std::shared_ptr<const codec::rotation_matrices> made_up_matrices(index_t head_dim) {
  std::vector<float> made(static_cast<std::size_t>(head_dim * head_dim), 0.0F);
  for (index_t d = 0; d < head_dim; ++d) {
    const auto at = static_cast<std::size_t>(d * head_dim + d);
    const bool pair = d % 2 == 0 ? d + 1 < head_dim : true;
    made[at] = pair ? 0.6F : 1.0F;
    if (pair && d % 2 == 0) made[at + 1] = 0.8F;
    if (pair && d % 2 != 0) made[at - 1] = -0.8F;
  }
  return std::make_shared<const codec::rotation_matrices>(cache_shape{1, 1, head_dim, 64}, made);
}

any_codec codec_named(const std::string& name, index_t head_dim) {
  any_codec made;
  if (name == "turned_rotated3") {
    codec::rotated<3> rotated;
    rotated.keys.rotation.matrices = rotated.values.rotation.matrices = made_up_matrices(head_dim);
    made.keys = codec::any_keys::of(rotated.keys);
    made.values = codec::any_values::of(rotated.values);
    return made;
  }
  if (name == "low_rank_16_and_2") {
    const codec::low_rank low_rank(
        made_up_bases(head_dim, {.bf16 = head_dim - head_dim / 2, .bits2 = head_dim / 2}));
    made.keys = codec::any_keys::of(low_rank.keys);
    made.values = codec::any_values::of(low_rank.values);
    return made;
  }
  if (name == "klt_5_and_3" || name == "klt_best_scales") {
    const index_t half = head_dim / 16 * 8;
    const codec::klt klt(made_up_bases(
        head_dim, {.bits5 = half, .bits3 = head_dim - half, .best_scales = name == "klt_best_scales"}));
    made.keys = codec::any_keys::of(klt.keys);
    made.values = codec::any_values::of(klt.values);
    return made;
  }
  if (name == "low_rank") {
    const index_t third = head_dim / 3;
    const codec::low_rank low_rank(
        made_up_bases(head_dim, {.f32 = head_dim - 2 * third, .int8 = third, .bits4 = third}));
    made.keys = codec::any_keys::of(low_rank.keys);
    made.values = codec::any_values::of(low_rank.values);
    return made;
  }
  if (name == "klt" || name == "centred_klt") {
    const index_t quarter = head_dim / 16 * 4;
    const codec::klt klt(made_up_bases(
        head_dim, {.int8 = quarter, .bits6 = quarter, .bits4 = quarter, .bits2 = head_dim - 3 * quarter}));
    codec::centred_keys<codec::klt_keys> centred;
    centred.turns = turns_for(head_dim);
    centred.rest = klt.keys;
    made.keys = name == "klt" ? codec::any_keys::of(klt.keys) : codec::any_keys::of(centred);
    made.values = codec::any_values::of(klt.values);
    return made;
  }
  made = kvcache::make_codec(name);
  made.keys = made.keys.turning_with(turns_for(head_dim));
  return made;
}

/// Of blocks of rows of several sizes, as they are stored and as they are read.
std::uint32_t checksum_of(const std::string& name, const kernel::table& kernels, int num_blocks) {
  std::uint32_t sum = 0;
  for (const index_t head_dim : {1, 7, 20, 64, 100, 128}) {
    const kvcache::block_geometry g{64, head_dim};
    const any_codec whole = codec_named(name, head_dim);
    const auto keys = kvcache::codec_at(whole.keys, 0, 0);
    const auto values = kvcache::codec_at(whole.values, 0, 0);
    const index_t key_bytes = keys.section_bytes(g);
    const kvcache::memory_block block(key_bytes + values.section_bytes(g), kvcache::huge_page_resource());
    numbers next;
    for (int i = 0; i < num_blocks; ++i) {
      // Of many magnitudes, and of one for each dim.
      std::vector<float> k = next.rows(64 * head_dim, 256.0F / static_cast<float>(1 + i));
      std::vector<float> v = next.rows(64 * head_dim);
      for (std::size_t j = 0; j < k.size(); ++j)
        k[j] *= static_cast<float>(1 + j % static_cast<std::size_t>(head_dim) % 13);
      std::vector<float> back(2 * k.size());
      std::memset(block.data(), 0, static_cast<std::size_t>(block.size()));
      keys.encode(kernels, g, block.data(), 0, 64, {k.data(), head_dim});
      values.encode(kernels, g, block.data() + key_bytes, 0, 64, {v.data(), head_dim});
      keys.decode(kernels, g, block.data(), 0, 64, {back.data(), head_dim});
      values.decode(kernels, g, block.data() + key_bytes, 0, 64, {back.data() + k.size(), head_dim});
      sum = kvcache::store::crc32c(std::span(block.data(), static_cast<std::size_t>(block.size())), sum);
      sum = kvcache::store::crc32c(std::as_bytes(std::span(back)), sum);
    }
  }
  return sum;
}

const std::map<std::string, std::uint32_t> known = {{"f32", 0xde5ff740U},
                                                    {"f16", 0x4e2ea4fbU},
                                                    {"bf16", 0xd18ee5f7U},
                                                    {"int8", 0xd4901d99U},
                                                    {"rotated4", 0xfe45245aU},
                                                    {"rotated3", 0xbbbe4540U},
                                                    {"rotated2", 0x8f4deaadU},
                                                    {"channel4", 0xfd7eec4dU},
                                                    {"channel3", 0xf60d1c60U},
                                                    {"balanced4", 0x35213766U},
                                                    {"balanced3", 0x288c34f9U},
                                                    {"balanced2", 0xb784345fU},
                                                    {"trellis4", 0xdb440e4eU},
                                                    {"trellis3", 0xc2a0c644U},
                                                    {"trellis2", 0x47829922U},
                                                    {"centred_int8", 0x3f9b7dbcU},
                                                    {"centred_rotated4", 0x4ff72c9eU},
                                                    {"centred_rotated3", 0x968e9c32U},
                                                    {"centred_rotated2", 0xad58ca57U},
                                                    {"centred_trellis4", 0xfc1d9fdfU},
                                                    {"centred_trellis3", 0xb3d9b218U},
                                                    {"centred_trellis2", 0x32fab0e6U},
                                                    {"turned_rotated3", 0x210031e0U},
                                                    {"low_rank", 0x51fee949U},
                                                    {"low_rank_16_and_2", 0x5418f2cbU},
                                                    {"klt", 0x84cbb365U},
                                                    {"klt_5_and_3", 0x034f5c8bU},
                                                    {"klt_best_scales", 0x7e3ceda1U},
                                                    {"centred_klt", 0xa151b556U}};

}  // namespace

TEST_CASE("the same rows are the same bytes in every build, on every instruction set", "[codec]") {
  std::vector<std::string> names = kvcache::codec_names();
  names.insert(names.end(), {"turned_rotated3", "low_rank", "low_rank_16_and_2", "klt", "klt_5_and_3",
                             "klt_best_scales", "centred_klt"});
  CHECK(names.size() == known.size());
  for (const std::string& name : names) {
    for (const kernel::isa level : kernel::available()) {
      CAPTURE(name, kernel::to_string(level));
      const auto found = known.find(name);
      // Searches through a trellis are long, and decided in integers.
      const int num_blocks =
          name.find("trellis") == std::string::npos && name.find("klt") == std::string::npos ? 100 : 4;
      CHECK(checksum_of(name, kernel::select(level), num_blocks) ==
            (found == known.end() ? 0 : found->second));
    }
  }
}
